"""What a model costs, and how near to that a machine comes."""
