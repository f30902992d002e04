"""Records of a run: logs, collapse metrics and alerts, online evaluation."""
