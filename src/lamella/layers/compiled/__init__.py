"""What only torch.compile needs, around the plain layers."""
