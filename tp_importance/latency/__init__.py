"""Latency: measured, kept in a table, predicted for other widths."""
