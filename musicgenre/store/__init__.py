"""Clips to a spectrogram store, and the store to batches."""
