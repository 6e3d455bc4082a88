"""A page on which people drop music and see what a model makes of it; needs the extra `demo`."""
