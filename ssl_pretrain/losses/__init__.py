"""Loss functions, which are pure functions of embeddings, with one file per family."""
