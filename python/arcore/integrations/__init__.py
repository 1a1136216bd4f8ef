"""Our ops under the names of other packages; each module is imported by name."""
