"""Proteins, molecules and other sequences of life."""
