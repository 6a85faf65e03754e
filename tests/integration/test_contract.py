from typing import Any

import torch_pruning as tp

from helpers.contract import ImportanceContract, PrunerContract
from tp_importance import BudgetPruner, CATROImportance, CATROPruner, OBSImportance, OBSPruner, PSAPImportance


class TestConsumerImportance(ImportanceContract):
    def make_importance(self):
        return CATROImportance()


class TestChannelImportance(ImportanceContract):
    def make_importance(self):
        return CATROImportance(space="channel")


class TestOBSImportance(ImportanceContract):
    def make_importance(self):
        return OBSImportance()


class TestOBSPruner(PrunerContract):
    needs_labels = False

    def make_pruner(self, model, x, loader, budget, **options: Any):
        return OBSPruner(model, x, loader, budget=budget, **options)


class TestPSAPImportance(ImportanceContract):
    def make_importance(self):
        return PSAPImportance()


class TestPSAPNormPruner(PrunerContract):
    """The criterion in one shot; the pruner that trains has tests of its own."""

    def make_pruner(self, model, x, loader, budget, **options: Any):
        return BudgetPruner(model, x, loader, budget=budget, importance=PSAPImportance(), **options)


class TestConsumerPruner(PrunerContract):
    def make_pruner(self, model, x, loader, budget, **options: Any):
        return CATROPruner(model, x, loader, budget=budget, **options)


class TestChannelPruner(PrunerContract):
    def make_pruner(self, model, x, loader, budget, **options: Any):
        return CATROPruner(model, x, loader, budget=budget, space="channel", **options)


class TestMagnitudePruner(PrunerContract):
    """An importance of Torch-Pruning that knows nothing of us."""

    uses_data = needs_labels = False

    def make_pruner(self, model, x, loader, budget, **options: Any):
        importance = tp.importance.MagnitudeImportance(p=1)
        return BudgetPruner(model, x, loader, budget=budget, importance=importance, **options)
