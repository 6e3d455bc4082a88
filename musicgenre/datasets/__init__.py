"""What clips there are, with labels, groups and splits."""
