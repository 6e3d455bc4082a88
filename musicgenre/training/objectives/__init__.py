"""What a run learns from: labels, views of one clip, reconstructions, teachers."""
