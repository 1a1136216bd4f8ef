"""Fewer or cheaper passes for the same or nearly the same samples."""
