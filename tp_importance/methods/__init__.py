"""One folder per method: importance, mathematics and pruner."""
