"""What needs a model and a store, or trains: evaluation, ablation, robustness, figures."""
