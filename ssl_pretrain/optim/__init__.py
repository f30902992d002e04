"""Optimizers whose steps can be masked, and schedules."""
