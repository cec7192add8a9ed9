"""Models from timm and others: families, checkpoints, where float models come from."""
