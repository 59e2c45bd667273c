"""Images of prompts: read, placed, and turned into embeddings."""
