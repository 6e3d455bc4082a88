"""From sound files to samples to features."""
