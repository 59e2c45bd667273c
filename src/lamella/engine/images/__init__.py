"""Images in prompts: reading, placeholder tokens, and embeddings."""
