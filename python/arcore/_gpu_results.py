"""The ops whose kernels a GPU has run rightly, by committed results; written by tools/bench_table.py."""

SEEN: dict[str, str] = {}
