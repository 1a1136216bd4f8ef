"""The zoo: one file or folder per published system, by topic. `arcore.catalog` finds them; nothing lists them."""
