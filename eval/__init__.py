"""Commands that evaluate the backbone of a run: k-NN, linear, fine-tuning, export, report."""
