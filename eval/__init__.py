"""Judges the backbone of a finished run: k-NN, linear probes, the report."""
