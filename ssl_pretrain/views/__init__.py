"""What a view is, and how an image becomes its views."""
