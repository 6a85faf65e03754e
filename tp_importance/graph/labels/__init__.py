"""Labels: which channel every entry of every tensor belongs to, found in one forward pass."""
