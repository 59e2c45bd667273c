"""State of layers between steps: declarations, block and slot allocation, the prefix cache, and the tensors."""
