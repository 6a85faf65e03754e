"""Pruned networks on disk: what is saved, and how it is checked when it is loaded."""
