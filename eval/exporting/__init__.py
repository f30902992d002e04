"""Formats and documentation of an exported backbone."""
