"""Formats of an exported backbone."""
