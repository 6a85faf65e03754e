"""Contract of an importance: what Torch-Pruning's own pruners make of its scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch_pruning as tp

from ..graph.counting import count_ops
from .cases import host_group, topology
from .networks import MISTRACED
from .scores import ImportanceCase

__all__ = ["TorchPruningTests"]


class TorchPruningTests(ImportanceCase):
    """``tp.pruner.BasePruner(importance=...)`` removes what scores least, and only where that is safe."""

    @pytest.mark.parametrize("name", ["residual", "concat", "dense", "se"])
    def test_torch_pruning_locally(self, name: str) -> None:
        """Half of every group goes: the units that the curve orders first."""
        importance, model, x = self.collected(name)
        groups, curves = importance.groups, importance.curves()
        weights = {g.name: model.get_parameter(f"{g.name}.weight").clone() for g in groups}
        before = count_ops(model, x)
        tp.pruner.BasePruner(model, x, importance, pruning_ratio=0.5, ignored_layers=[list(model.modules())[-1]]).step()
        for g in groups:
            kept = np.sort(curves[g.name].order[g.n_units // 2 :])
            own, filters = model.get_parameter(f"{g.name}.weight"), weights[g.name][torch.from_numpy(kept)]
            assert len(own) == len(filters), g.name
            if own.shape == filters.shape:  # nothing in front of it was pruned
                assert torch.equal(own, filters), g.name
        assert count_ops(model, x)[0] < before[0] and model(x).shape == (2, 4)

    @pytest.mark.parametrize("name", ["residual", "grouped", "flatten"])
    def test_torch_pruning_globally(self, name: str) -> None:
        """With one threshold for all layers as many channels go as asked for, and no layer vanishes."""
        importance, model, x = self.collected(name)
        widths = importance.groups.widths
        pruner = tp.pruner.BasePruner(
            model, x, importance, pruning_ratio=0.4, global_pruning=True, ignored_layers=[list(model.modules())[-1]]
        )
        pruner.step()
        left = {n: len(model.get_parameter(f"{n}.weight")) for n in widths}
        assert all(0 < left[n] <= widths[n] for n in widths) and left != widths
        assert model(x).shape == (2, 4)
        wanted = 0.6 * sum(widths.values())
        assert name == "grouped" or sum(left.values()) == pytest.approx(
            wanted, abs=max(4, 0.1 * wanted)
        )  # strict scores: no landslide

    @pytest.mark.parametrize("name", ["plain", *sorted(MISTRACED)])
    def test_unsafe_groups_get_none_and_are_skipped(self, name: str) -> None:
        """Outputs of the network, and groups that Torch-Pruning would cut wrongly, get ``None`` and stay whole."""
        importance, model, x = self.collected(name)
        graph = tp.DependencyGraph().build_dependency(model, x)
        groups = topology(name).groups
        unsafe = {e.name.split("/")[0] for e in groups.excluded}
        assert unsafe
        if name in MISTRACED:  # the first group is the one
            unsafe.add(groups.groups[0].root[0])
        for layer in unsafe:
            assert importance(host_group(graph, model.get_submodule(layer))) is None
        tp.pruner.BasePruner(model, x, importance, pruning_ratio=0.5).step()
        dense = topology(name).model
        for layer in unsafe:
            assert len(model.get_parameter(f"{layer}.weight")) == len(dense.get_parameter(f"{layer}.weight"))
        assert model(x).shape == (2, 4)
