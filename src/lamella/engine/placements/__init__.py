"""State pools of each placement of a supernet, and switching between placements."""
