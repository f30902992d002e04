"""Backbone and classifier trained together on labels."""
