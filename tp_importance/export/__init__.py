"""Pruned networks for other runtimes, in files that were tried before they got their name."""
