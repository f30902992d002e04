"""Views: their recipe, and how an image becomes its views."""
