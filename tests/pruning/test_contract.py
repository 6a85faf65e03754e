"""A pruner with an importance of Torch-Pruning that knows nothing of us keeps the contract."""

import torch_pruning as tp

from tp_importance import BudgetPruner
from tp_importance.testing import PrunerContract


class TestMagnitudePruner(PrunerContract):
    uses_data = needs_labels = False

    def make(self, model, x, loader, budget, **options):
        importance = tp.importance.MagnitudeImportance(p=1)
        return BudgetPruner(model, x, loader, budget=budget, importance=importance, **options)
