"""Features that are pretrained and then used for something else."""
