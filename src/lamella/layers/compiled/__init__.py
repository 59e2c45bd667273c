"""Wrappers around the plain layers that only torch.compile needs."""
