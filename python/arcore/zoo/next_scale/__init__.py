"""Images token map by token map, coarse to fine."""
