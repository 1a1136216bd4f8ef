"""What acts in an environment and learns from it."""
