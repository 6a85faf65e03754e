"""CATRO keeps the contracts, with the scatter of the consumer and with the literal one of channels."""

from tp_importance import CATROImportance, CATROPruner
from tp_importance.testing import ImportanceContract, PrunerContract


class TestConsumerImportance(ImportanceContract):
    def make(self):
        return CATROImportance()


class TestChannelImportance(ImportanceContract):
    def make(self):
        return CATROImportance(space="channel")


class TestConsumerPruner(PrunerContract):
    def make(self, model, x, loader, budget, **options):
        return CATROPruner(model, x, loader, budget=budget, **options)


class TestChannelPruner(PrunerContract):
    def make(self, model, x, loader, budget, **options):
        return CATROPruner(model, x, loader, budget=budget, space="channel", **options)
