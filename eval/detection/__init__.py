"""Detection and instance segmentation with a run's backbone, trained further."""
