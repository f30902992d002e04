"""Sources of images (`sources`), their order (`order`), and batches of views (`loader`)."""
