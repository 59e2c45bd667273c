"""Cost of a model, and measurements of its speed against the roofline floor."""
