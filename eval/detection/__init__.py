"""Detection and instance segmentation from a run's backbone: `python -m eval.detection RUN`."""
