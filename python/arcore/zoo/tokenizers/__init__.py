"""Signals to discrete codes and back."""
