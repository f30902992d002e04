"""The lock of a run's folder, and the guard against non-finite gradients."""
