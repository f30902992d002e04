"""Loss functions, one file a family: pure functions of embeddings."""
