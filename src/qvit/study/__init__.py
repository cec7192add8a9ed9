"""Studies: the ablation, its report, the demo."""
