"""Data sets in other formats than image files: NumPy, IDX, CIFAR, STL-10, Parquet and Arrow."""
