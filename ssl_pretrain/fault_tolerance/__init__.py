"""What keeps a run alive and alone: the lock of its folder, the guard against non-finite steps."""
