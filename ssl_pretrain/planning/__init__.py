"""What a configuration would cost, computed before it runs."""
