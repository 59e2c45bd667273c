"""Vision encoders, which turn images into embeddings."""
