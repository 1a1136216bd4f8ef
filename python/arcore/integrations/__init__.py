"""Our ops under the names of other packages; each module is imported by name."""

from arcore._guard import guard_package

guard_package(__name__)
