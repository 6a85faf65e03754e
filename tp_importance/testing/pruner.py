"""The contract of a pruner."""

from __future__ import annotations

from .budgets import BudgetTests
from .robustness import RobustnessTests
from .surgery import SurgeryTests

__all__ = ["PrunerContract"]


class PrunerContract(SurgeryTests, BudgetTests, RobustnessTests):
    """What a user expects of a :class:`.BudgetPruner` or a class with its interface.

    Inherit in a test file, say how to make the pruner, and pytest runs every test on it. A criterion of Torch-Pruning
    that reads neither data nor labels, for example:

    >>> import torch_pruning as tp
    >>> from tp_importance import BudgetPruner
    >>> from tp_importance.testing import PrunerContract
    >>> class TestMine(PrunerContract):
    ...     uses_data = needs_labels = False
    ...     def make(self, model, x, loader, budget, **options):
    ...         importance = tp.importance.MagnitudeImportance(p=1)
    ...         return BudgetPruner(model, x, loader, budget=budget, importance=importance, **options)
    >>> TestMine().test_the_same_seed_gives_the_same_network()

    * **Surgery** (:class:`.SurgeryTests`): a step removes what the plan says and nothing else; the network computes
      what the dense one did with those channels masked; histories replay, files load, training goes on.
    * **Budgets** (:class:`.BudgetTests`): met as counted on the pruned network, one after another from one pass over
      the data, refused if out of reach; options and allocators are kept.
    * **Robustness** (:class:`.RobustnessTests`): wrong data, failing loaders and wrong histories are errors that leave
      model and pruner as they were.

    A test that cannot hold for a method is set to ``None``, with the reason beside it.

    Attributes:
        uses_data: whether the criterion reads the loader.
        needs_labels: whether it reads labels.
    """
