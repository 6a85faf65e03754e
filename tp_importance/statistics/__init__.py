"""One pass over a loader: what layers receive, gradients, batch norm moments."""
