"""Processes of a tensor-parallel engine, and the messages between them."""
