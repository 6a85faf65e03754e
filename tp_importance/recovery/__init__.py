"""After pruning: distillation from the dense network, and slicing a classifier to a subtask."""
