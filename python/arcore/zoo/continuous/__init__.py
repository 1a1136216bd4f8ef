"""Images as continuous tokens, drawn by diffusion or flows."""
