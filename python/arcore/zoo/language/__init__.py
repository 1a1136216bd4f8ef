"""Text, token after token or otherwise."""
