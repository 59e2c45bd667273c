"""Forms of the plain layers that only torch.compile needs."""
