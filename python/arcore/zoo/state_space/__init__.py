"""Recurrences with a state of constant size."""
