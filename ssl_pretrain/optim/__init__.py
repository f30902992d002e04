"""Optimizers that skip non-finite steps, and schedules."""
