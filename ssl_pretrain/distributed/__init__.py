"""Ranks: the process group, its collectives with their true gradients, stop requests."""
