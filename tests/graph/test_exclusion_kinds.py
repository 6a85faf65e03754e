"""Every group that is left alone says why in one word, which code can ask for."""

import dataclasses
import json

import pytest
import torch
import torch_pruning as tp
from torch import nn

from tp_importance import Budget, BudgetPruner, prunable_groups
from tp_importance.allocation.limits import require_reachable
from tp_importance.allocation.space import WidthSpace
from tp_importance.graph.classes import build_groups
from tp_importance.graph.cost import CostModel
from tp_importance.graph.groups import Excluded
from tp_importance.graph.tracing import trace
from tp_importance.pruning.report import PruningReport

X = torch.randn(2, 3, 8, 8)


def chain(*layers):
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), *layers, nn.Conv2d(8, 4, 3, padding=1))


class Readout(nn.Module):
    """Reads its channels by a weight of its own, as no layer that is known."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(8, 4))

    def forward(self, x):
        return x.mean((2, 3)) @ self.table


class ReadoutPruner(tp.pruner.BasePruningFunc):
    """How the channels of a :class:`Readout` go."""

    def prune_out_channels(self, layer, idxs):
        kept = sorted(set(range(layer.table.shape[1])) - set(idxs))
        layer.table = nn.Parameter(layer.table.data[:, kept])
        return layer

    def prune_in_channels(self, layer, idxs):
        kept = sorted(set(range(layer.table.shape[0])) - set(idxs))
        layer.table = nn.Parameter(layer.table.data[kept])
        return layer

    def get_out_channels(self, layer):
        return layer.table.shape[1]

    def get_in_channels(self, layer):
        return layer.table.shape[0]


class Auxiliary(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.aux = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        y = self.a(x).relu()
        return (self.b(y), self.aux(y)) if self.training else self.b(y)


def computed():
    layer = nn.Conv2d(8, 8, 3, padding=1)
    return chain(nn.utils.parametrizations.spectral_norm(layer), nn.ReLU())


CASES = {
    "output": (chain, {}, "2"),
    "ignored": (chain, {"ignored_layers": [nn.Conv2d]}, "0"),
    "mixed": (lambda: chain(nn.Softmax(1)), {}, "0"),
    "computed": (computed, {}, "2"),
    "unread": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), Readout()),
        {"customized_pruners": {Readout: ReadoutPruner()}},
        "0",
    ),
    "minimum": (lambda: nn.Sequential(nn.Conv2d(3, 1, 1), nn.Conv2d(1, 4, 1)), {}, "0"),
    "training": (Auxiliary, {}, "a"),
    "unverified": (chain, {"verify": lambda groups, _: dict.fromkeys(groups.names, "asked for")}, "0"),
}


@pytest.mark.parametrize("kind", CASES)
def test_kind(kind):
    make, options, name = CASES[kind]
    found = {e.name: e for e in prunable_groups(make(), X, **options).excluded}
    assert found[name].kind == kind and found[name].reason


def test_kind_and_reason_are_those_that_stay_when_nothing_is_ignored():
    narrow = nn.Sequential(nn.Conv2d(3, 1, 1), nn.Conv2d(1, 4, 1))
    for model, name, kind in ((chain(), "2", "output"), (narrow, "0", "minimum")):
        asked = {e.name: e for e in prunable_groups(model, X, ignored_layers=[nn.Conv2d]).excluded}
        plain = {e.name: e for e in prunable_groups(model, X).excluded}
        assert asked[name] == plain[name] and plain[name].kind == kind


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="conv: kind='because' must be one of output, ignored"):
        Excluded("conv", 4, "a reason", "because")


def test_layers_are_those_that_make_the_channels():
    groups = build_groups(trace(chain(), X))
    assert [list(e.layers) for e in groups.excluded] == [["2"]]
    # a depthwise convolution on the input: no layer makes its channels, which are not spoken of
    net = nn.Sequential(nn.Conv2d(3, 3, 3, groups=3), nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1))
    groups = prunable_groups(net, X)
    assert groups.names == ["1"] and [e.name for e in groups.excluded] == ["3"]


def test_excluding_keeps_the_kind_through_a_step_and_a_report():
    model = nn.Sequential(*(m for _ in range(2) for m in (nn.Conv2d(3, 3, 1), nn.ReLU())), *chain())
    judged = {"0": "a verifier said so"}
    pruner = BudgetPruner(
        model,
        X,
        importance=lambda group: torch.arange(float(len(group[0].idxs))),
        budget=Budget(macs=0.7),
        allocator="greedy",
        ignored_layers=[model[2]],
        verify=lambda groups, _: {n: r for n, r in judged.items() if n in groups.names},
    )
    before = {e.name: (e.reason, e.kind) for e in pruner.groups.excluded}
    assert before["0"] == ("a verifier said so", "unverified") and before["2"][1] == "ignored"
    report = pruner.step()
    assert {e.name: (e.reason, e.kind) for e in pruner.groups.excluded} == before
    again = PruningReport.from_dict(json.loads(report.to_json()))
    assert again.excluded == report.excluded and {e.name: (e.reason, e.kind) for e in again.excluded} == before


def test_only_the_kind_decides_what_an_error_advises():
    groups = prunable_groups(chain(), X)
    named = [dataclasses.replace(e, reason="0 is in ignored_layers") for e in groups.excluded]
    for kind, advised in (("ignored", True), ("output", False)):
        found = [dataclasses.replace(e, kind=kind) for e in named]
        cost = CostModel.from_groups(dataclasses.replace(groups, excluded=found))
        with pytest.raises(ValueError) as caught:
            require_reachable(cost, WidthSpace.of(groups.groups), {"macs": 1})
        assert ("ignore fewer layers" in str(caught.value)) is advised


class Taken(nn.Module):
    """Something between two convolutions that looks at channels by number, or at all at once."""

    def __init__(self, between, inputs):
        super().__init__()
        self.a, self.b, self.between = nn.Conv2d(3, 8, 1), nn.Conv2d(inputs, 4, 1), between

    def forward(self, x):
        return self.b(self.between(self.a(x)))


@pytest.mark.parametrize(
    ("between", "inputs", "expected"),
    [
        (lambda y: y[:, :1], 1, {"a/0": ("minimum", "one channel"), "a/1": ("unread", "no convolution, linear or")}),
        (lambda y: y[:, 3][:, None], 1, {"a/0": ("pinned", "by their number"), "a/1": ("minimum", "one channel")}),
        (lambda y: y.relu() if y.sum() > -1e9 else y, 8, {"a": ("mixed", "one number of all its channels")}),
    ],
)
def test_the_reason_is_what_the_code_does_to_the_channels(between, inputs, expected):
    found = {e.name: (e.kind, e.reason) for e in prunable_groups(Taken(between, inputs), X).excluded if e.name != "b"}
    assert found.keys() == expected.keys()
    for name, (kind, text) in expected.items():
        assert found[name][0] == kind and text in found[name][1]
