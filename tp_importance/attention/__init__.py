"""Attention whose sizes are attributes, so that heads and dimensions of heads can go."""
