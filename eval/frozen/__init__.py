"""Features of a frozen backbone and the classifiers on them."""
