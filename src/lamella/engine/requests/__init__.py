"""A request from its prompt to its text: checks, tokens, sampling parameters, output."""
