"""Vectors of images in files, and nearest-neighbor indexes of them."""
