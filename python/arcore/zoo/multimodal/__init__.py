"""Text and images, or other pairs of senses, in one sequence."""
