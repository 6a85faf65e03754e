"""Contract of an importance: when its statistics are valid, and what collecting them leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch_pruning as tp
from torch import nn

from ..errors import NotCollectedError, StaleStatisticsError
from ..graph.discovery import prunable_groups
from .cases import host_group
from .data import loader_for
from .networks import make_network
from .scores import ImportanceCase
from .snapshots import Snapshot

__all__ = ["CollectTests"]


class CollectTests(ImportanceCase):
    """Statistics that are missing or stale are an error, and looking at a network does not change it."""

    def test_nothing_before_collect(self) -> None:
        """Whatever needs statistics says that there are none yet."""
        model, x = make_network("plain")
        graph = tp.DependencyGraph().build_dependency(model, x)
        importance = self.make()
        uses: list[Callable[[], Any]] = [
            lambda: importance(host_group(graph, model.get_submodule("0.0"))),
            importance.curves,
            lambda: importance.groups,
            lambda: importance.constant_units,
        ]
        for use in uses:
            with pytest.raises(NotCollectedError, match="collect"):
                use()

    def test_stale_after_a_step(self) -> None:
        """Statistics of the network as it was before a surgery are refused; collected again, they hold."""
        importance, model, x = self.collected("residual")
        ignored = [model.get_submodule("3")]
        tp.pruner.BasePruner(model, x, importance, pruning_ratio=0.5, ignored_layers=ignored).step()
        graph = tp.DependencyGraph().build_dependency(model, x)
        stem = model.get_submodule("0.0")
        with pytest.raises(StaleStatisticsError, match="collect"):
            importance(host_group(graph, stem))
        with pytest.raises(StaleStatisticsError, match="stale"):
            importance.curves(prunable_groups(model, x))
        importance.collect(model, x, loader_for(x))
        assert importance(host_group(graph, stem)) is not None

    def test_a_failed_collect_keeps_the_old_statistics(self) -> None:
        """Data with NaN are refused, and what was known before is still known."""
        importance, model, x = self.collected("plain")
        before = importance.curves()
        bad = [(a * float("nan"), y) for a, y in loader_for(x)]
        with pytest.raises(ValueError):
            importance.collect(model, x, bad)
        assert importance.curves().keys() == before.keys()
        for name, curve in importance.curves().items():
            assert np.array_equal(curve.order, before[name].order) and np.array_equal(curve.loss, before[name].loss)

    def test_collect_leaves_the_model_alone(self) -> None:
        """Values, modes, flags, hooks and the global random generator are what they were."""
        model, x = make_network("residual")
        model.train().get_submodule("1").eval()
        model.get_submodule("0").requires_grad_(False)
        snapshot, rng = Snapshot(model), torch.get_rng_state()
        self.make().collect(model, x, loader_for(x))
        snapshot.check()
        assert torch.equal(torch.get_rng_state(), rng)

    def test_no_group_to_prune(self) -> None:
        """A network in which every layer is ignored is refused."""
        model, x = make_network("plain")
        with pytest.raises(ValueError, match="no group that can be pruned"):
            self.make().collect(model, x, loader_for(x), ignored_layers=[nn.Conv2d])
