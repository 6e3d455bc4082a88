"""Claims about speed: one script each, which measures both sides in turns and prints their ratio. Run with `python -m`."""
