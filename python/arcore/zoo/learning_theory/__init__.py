"""Closed forms of what networks learn, checked and drawn."""
