"""One file per method: its layers, its loss, and how it writes."""
