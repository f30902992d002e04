"""Sentences, pairs and triplets of sentences without images: files of texts, and WordNet."""
