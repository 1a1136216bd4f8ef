"""Procedures with a guarantee: tests, estimators, private data."""
