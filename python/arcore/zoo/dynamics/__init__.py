"""Videos, physics and motion, frame after frame."""
