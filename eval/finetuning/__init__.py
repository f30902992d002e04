"""Fine-tuning of the whole network on labeled images."""
