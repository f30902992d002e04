"""Detection and instance segmentation from a run's backbone: `python -m ssl_pretrain.eval.detection RUN`."""
