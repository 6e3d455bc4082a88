"""Configs with a `sweep()`: the variants of an ablation."""
