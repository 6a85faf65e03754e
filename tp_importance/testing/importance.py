"""The contract of an importance."""

from __future__ import annotations

from .collecting import CollectTests
from .hosts import TorchPruningTests
from .scores import ScoreTests

__all__ = ["ImportanceContract"]


class ImportanceContract(ScoreTests, TorchPruningTests, CollectTests):
    """What Torch-Pruning and our allocators expect of a :class:`.StatisticalImportance`.

    Inherit in a test file, say how to make the importance, and pytest runs every test on it:

    >>> from tp_importance import CATROImportance
    >>> from tp_importance.testing import ImportanceContract
    >>> class TestMine(ImportanceContract):
    ...     def make(self):
    ...         return CATROImportance()
    >>> TestMine().test_deterministic()

    * **Scores** (:class:`.ScoreTests`): one finite float32 per channel, no two units alike, the same for a unit
      wherever Torch-Pruning enters its group, in the order of the loss curve, reproducible, and unmoved by the order
      in which channels are stored.
    * **Torch-Pruning** (:class:`.TorchPruningTests`): its pruners, local and global, remove what scores least;
      groups that cannot be cut safely get ``None`` and stay whole.
    * **Statistics** (:class:`.CollectTests`): an error before :meth:`~.StatisticalImportance.collect` and after a
      surgery; nothing about the model changes; bad data leave the old statistics in place.

    The data are labelled, balanced and of four classes (:func:`.class_loader`); the networks small
    (:data:`.networks.TOPOLOGIES`). A test that cannot hold for a method is set to ``None``, with the reason beside it.
    """
