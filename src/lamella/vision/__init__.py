"""Models that turn images into embeddings."""
