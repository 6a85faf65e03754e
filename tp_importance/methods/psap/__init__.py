"""PSAP: prune while training, by the sparsity of the weights (arXiv 2303.11881)."""
