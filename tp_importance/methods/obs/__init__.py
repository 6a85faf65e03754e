"""Structured optimal brain surgeon."""
