"""Training: recipes, the loop, evaluation, checkpoints of a run."""
