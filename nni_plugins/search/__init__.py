"""Searches that NNI runs: a tuner that keeps the budget, and experiments that end."""
