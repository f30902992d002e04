"""Reading, writing and checking of FFCV's `.beton` files."""
