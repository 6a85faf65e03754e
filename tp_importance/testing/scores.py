"""Contract of an importance: what its scores and its loss curves are."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn

from ..graph.groups import PrunableGroups
from ..graph.label_graph import LabelGraph
from ..pruning.importance import StatisticalImportance
from .cases import SEVERAL, host_group, permuted, topology
from .data import loader_for
from .networks import MISTRACED

__all__ = ["ImportanceCase", "ScoreTests"]


class ImportanceCase:
    """What every test of an importance starts from."""

    def make(self) -> StatisticalImportance:
        """A fresh importance, which has not seen data yet."""
        raise NotImplementedError

    def collected(self, name: str, dtype: torch.dtype | None = None) -> tuple[StatisticalImportance, nn.Module, Tensor]:
        """An importance with statistics, and the network they are of: a copy, which tests may prune.

        Args:
            name: key of :data:`.networks.TOPOLOGIES`.
            dtype: of the network and its inputs.
        """
        case = topology(name).copy()
        model, x = case.model, case.x
        groups: PrunableGroups | None = case.groups
        if dtype is not None:
            model, x, groups = model.to(dtype), x.to(dtype), None
        return self.make().collect(model, x, loader_for(x), groups=groups), model, x

    def assert_scores(self, scores: Any, width: int) -> None:
        """Scores of a layer are one finite float32 per channel, on its device, apart from any graph of gradients."""
        assert isinstance(scores, Tensor) and scores.shape == (width,)
        assert scores.dtype == torch.float32 and scores.device.type == "cpu" and not scores.requires_grad
        assert torch.isfinite(scores).all()


class ScoreTests(ImportanceCase):
    """Scores are of the right form, strict, reproducible, and know nothing of the order of channels."""

    @pytest.mark.parametrize("name", SEVERAL)
    def test_scores_of_every_root(self, name: str) -> None:
        """Right shape and dtype; no two units alike; a unit scores the same wherever Torch-Pruning starts.

        Where Torch-Pruning couples other channels than those of a unit, the group gets ``None``; then the score is that
        of the group from labels.
        """
        importance, model, x = self.collected(name)
        graph, labels = (g.build_dependency(model, x) for g in (tp.DependencyGraph(), LabelGraph(verify=False)))
        for group in importance.groups:
            ranks: dict[int, set[float]] = defaultdict(set)
            for member in group.members:
                layer, channels = model.get_submodule(member.name), range(member.width)
                scores = importance(host_group(graph, layer, member.role))
                if scores is None:
                    assert name in MISTRACED
                    channels = member.channels.tolist()
                    scores = importance(host_group(labels, layer, member.role, channels))
                assert scores is not None
                self.assert_scores(scores, len(channels))
                scored = dict(zip(channels, scores.tolist(), strict=True))
                for channel, unit in zip(member.channels, member.units, strict=True):
                    ranks[int(unit)].add(scored[int(channel)])
            assert all(len(found) == 1 for found in ranks.values())
            values = [found.pop() for found in ranks.values()]
            assert len(set(values)) == len(values) == group.n_units
            assert 0 < min(values) and max(values) <= 1

    def test_scores_of_some_channels(self) -> None:
        """Asked for some channels only, it gives their scores in the order asked for."""
        importance, model, x = self.collected("plain")
        graph = tp.DependencyGraph().build_dependency(model, x)
        layer = model.get_submodule("1.0")
        everything = importance(host_group(graph, layer))
        assert everything is not None
        some = importance(graph.get_pruning_group(layer, tp.prune_conv_out_channels, [7, 2, 5]))
        assert some is not None and torch.equal(some, everything[[7, 2, 5]])

    @pytest.mark.parametrize("name", ["residual", "flatten"])
    def test_ranks_follow_the_curve(self, name: str) -> None:
        """A curve has a finite loss at every width, and scores order the units as the curve does."""
        importance, model, x = self.collected(name)
        graph = tp.DependencyGraph().build_dependency(model, x)
        for group in importance.groups:
            curve = importance.curves()[group.name]
            assert len(curve.loss) == group.n_units + 1 and np.isfinite(curve.loss).all()
            scores = importance(host_group(graph, model.get_submodule(group.root[0]), group.root[1]))
            assert scores is not None
            assert torch.argsort(scores[torch.from_numpy(group.root_channels)]).tolist() == curve.order.tolist()

    def test_deterministic(self) -> None:
        """The same data give the same curves, bit for bit."""
        first, second = (self.collected("residual")[0].curves() for _ in range(2))
        for name in first:
            assert np.array_equal(first[name].order, second[name].order)
            assert np.array_equal(first[name].loss, second[name].loss)

    @pytest.mark.parametrize(
        ("name", "group"),
        [
            ("plain", "1.0"),
            ("residual", "0.0"),
            ("concat", "right.0"),
            ("flatten", "1.0"),
            ("depthwise", "1.body.0"),
            ("transposed", "up.0"),
        ],
    )
    def test_equivariant_to_the_order_of_channels(self, name: str, group: str) -> None:
        """Channels in another order keep their values (in float64, so that rounding does not swap neighbours)."""
        case = topology(name)
        n = case.groups[group].n_units
        order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
        model, x = copy.deepcopy(case.model).double(), case.x.double()
        other = permuted(case, group, order).double()
        torch.testing.assert_close(model(x), other(x))
        loader = [(a.double(), y) for a, y in loader_for(x)]
        curves, moved = (
            self.make().collect(m, x, loader, groups=case.groups_of(m, x)).curves() for m in (model, other)
        )
        for key in curves:
            found = order[moved[key].order].tolist() if key == group else moved[key].order.tolist()
            assert found == curves[key].order.tolist()
            np.testing.assert_allclose(moved[key].loss, curves[key].loss, rtol=1e-6, atol=1e-9)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_other_precisions(self, dtype: torch.dtype) -> None:
        """A network of another precision gets float32 scores, too."""
        importance, model, x = self.collected("residual", dtype)
        graph = tp.DependencyGraph().build_dependency(model, x)
        self.assert_scores(importance(host_group(graph, model.get_submodule("0.0"))), 8)
