"""Sound files to samples to features."""
