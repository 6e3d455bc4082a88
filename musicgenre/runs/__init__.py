"""Saved runs: checkpoints, notes, bundles, and the models loaded from them."""
