"""The zoo: one file or folder per published system, by topic. `arcore.catalog` finds them; nothing lists them."""

from arcore._guard import guard_package

guard_package(__name__)
