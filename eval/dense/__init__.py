"""Semantic segmentation: masks and their layouts, frozen patch tokens, and fine-tuning."""
