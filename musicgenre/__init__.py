"""Music genre and tag recognition from sound with convolutional networks."""

__version__ = "0.1.0"
