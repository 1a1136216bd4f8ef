"""Objectives that bend a model towards preferences and rewards."""
