"""Pruners that conform to NNI's ``Pruner``: one file per method, and what they share."""
