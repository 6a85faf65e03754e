"""ITPruner: widths from what layers share and a convex program (arXiv 2108.08532)."""
