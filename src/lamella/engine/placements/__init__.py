"""State pools for each placement of a supernet, and the switch between placements."""
