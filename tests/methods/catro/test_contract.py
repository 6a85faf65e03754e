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
    # how the class answers to wrong data does not hang on the form
    test_bad_labels = test_bad_loaders = test_the_loaders_own_exception_passes = None
    test_a_step_that_failed_can_be_repeated = test_a_history_that_does_not_fit = None

    def make(self, model, x, loader, budget, **options):
        return CATROPruner(model, x, loader, budget=budget, space="channel", **options)
