"""Where images come from (`sources`), in which order (`order`), and how they become batches of views (`loader`)."""
