"""Weights & Biases: one client process per run."""
