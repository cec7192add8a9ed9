"""Training, evaluation and the ablation: recipes, data, checkpoints and the loop."""
