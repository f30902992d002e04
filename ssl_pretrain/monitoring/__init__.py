"""What a run records about itself: logs, collapse metrics and alerts, online evaluation."""
