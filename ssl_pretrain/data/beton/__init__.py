"""FFCV's `.beton` files: read, written, checked."""
