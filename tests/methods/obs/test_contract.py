"""OBS keeps the contracts."""

from tp_importance import OBSImportance, OBSPruner
from tp_importance.testing import ImportanceContract, PrunerContract


class TestOBSImportance(ImportanceContract):
    def make(self):
        return OBSImportance()


class TestOBSPruner(PrunerContract):
    needs_labels = False

    def make(self, model, x, loader, budget, **options):
        return OBSPruner(model, x, loader, budget=budget, **options)
