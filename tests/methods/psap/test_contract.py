"""PSAP's criterion, in one shot, keeps the contracts; the pruner that trains has tests of its own."""

from tp_importance import BudgetPruner, PSAPImportance
from tp_importance.testing import ImportanceContract, PrunerContract


class TestPSAPImportance(ImportanceContract):
    def make(self):
        return PSAPImportance()


class TestPSAPNormPruner(PrunerContract):
    def make(self, model, x, loader, budget, **options):
        return BudgetPruner(model, x, loader, budget=budget, importance=PSAPImportance(), **options)
