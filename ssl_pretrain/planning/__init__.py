"""Memory and time of a configuration, computed before it runs."""
