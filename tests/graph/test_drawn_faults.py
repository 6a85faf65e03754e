"""Small networks that a drawn one shrank to, because the groups that were found in it could not be pruned."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import nn

from benchmarks.zoo.drawn.checks import examine_network
from benchmarks.zoo.scramble import scramble
from tp_importance import Budget, BudgetPruner, count_ops, prunable_groups
from tp_importance.budget import Cost
from tp_importance.graph.history import PruningHistory, repeat
from tp_importance.graph.surgery import remove_units


def examined(model: nn.Module, x: torch.Tensor) -> dict[str, tuple[int, int]]:
    """Width and units of every group; what is found is pruned, and compared with what was promised."""
    scramble(model.eval(), lambda: model(x), torch.Generator().manual_seed(0))
    examine_network(model, x)
    return {g.name: (g.width, g.n_units) for g in prunable_groups(model, x, verify=False)}


def between(*layers: nn.Module, features: int) -> nn.Sequential:
    """Layers between a convolution with eight outputs and a linear layer."""
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *layers, nn.Flatten(), nn.Linear(features, 3))


IMAGES = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize(
    ("outputs", "groups", "expected"),
    [
        (4, 4, {"0": (8, 4)}),  # every filter has two inputs of its own
        (16, 8, {"0": (8, 8)}),  # every input has two filters
        (12, 2, {"0": (8, 4), "1": (12, 6)}),  # the same channel of every group goes
        (8, 8, {"0": (8, 8)}),
    ],
)
def test_grouped_convolutions_of_every_kind(kind, outputs, groups, expected):
    model = between(kind(8, outputs, 1, groups=groups), features=outputs * 16)
    assert examined(model, IMAGES) == expected


def test_native_shuffles_keep_whole_blocks():
    assert examined(between(nn.ChannelShuffle(2), features=128), IMAGES) == {"0": (8, 4)}
    assert examined(between(nn.PixelShuffle(2), nn.PixelUnshuffle(2), features=128), IMAGES) == {"0": (8, 2)}


@pytest.mark.parametrize("affine", [True, False])
def test_a_group_norm_with_as_many_groups_as_channels(affine):
    assert examined(between(nn.GroupNorm(8, 8, affine=affine), features=128), IMAGES) == {"0": (8, 8)}


def test_a_prelu_of_which_one_channel_is_left():
    model = between(nn.PReLU(8), features=128)
    groups = prunable_groups(model, IMAGES)
    remove_units(groups, {"0": list(range(1, 8))})
    assert model[1].weight.shape == (1,) and model(IMAGES).shape == (2, 3)


class Halves(nn.Module):
    """Slices at half of the width."""

    def __init__(self, width):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, width, 3), nn.Linear(width // 2, 3), nn.Linear(width - width // 2, 3)

    def forward(self, x):
        y = self.a(x).mean((2, 3))
        half = y.shape[1] // 2
        return self.b(y[:, :half]) + self.c(y[:, half:])


class Front(nn.Module):
    """The first channels are cut off at a number that the code computes from how many there are."""

    def __init__(self, width, cut):
        super().__init__()
        self.cut = cut
        self.a, self.b = nn.Conv2d(3, width, 3, padding=1), nn.Linear(cut(width), 3)
        self.c = nn.Linear(width - cut(width), 3)

    def forward(self, x):
        y = self.a(x).mean((2, 3))
        front = self.cut(y.shape[1])
        return self.b(y[:, :front]) + self.c(y[:, front:])


@pytest.mark.parametrize(
    ("width", "cut", "expected"),
    [
        (16, lambda c: 4, {"a/1": 12}),
        (7, lambda c: 1, {"a/1": 6}),
        (16, lambda c: c // 4, {}),  # one channel less, and the front is shorter
        (7, lambda c: c // 4, {}),  # with six and with four channels it is as long as before
        (12, lambda c: min(3, c // 2), {}),  # so it is until the half of all has gone
    ],
    ids=["fixed", "fixed, narrow", "a quarter", "a quarter, narrow", "half, but at most three"],
)
def test_slices_at_a_computed_channel(width, cut, expected):
    assert prunable_groups(Front(width, cut).eval(), IMAGES).widths == expected


def test_slices_at_the_half_of_an_odd_width():
    """Of seven channels one may go, then the halves are as long as before; with three they are not."""
    assert examined(Halves(8), IMAGES) == {"a": (8, 4)}
    assert prunable_groups(Halves(7).eval(), IMAGES).names == []


class Parts(nn.Module):
    """A layer that a module's sizes split in two, the parts read by layers of their own."""

    def __init__(self, sizes):
        super().__init__()
        self.sizes = sizes
        self.a, self.b, self.c = nn.Conv2d(3, sum(sizes), 3), nn.Linear(sizes[0], 3), nn.Linear(sizes[1], 3)

    def forward(self, x):
        left, right = self.a(x).mean((2, 3)).split(self.sizes, 1)
        return self.b(left) + self.c(right)


@pytest.mark.parametrize(("least", "other"), [("a/0", "a/1"), ("a/1", "a/0")])
def test_a_part_of_which_one_channel_is_left_takes_no_number_of_the_other(least, other):
    model = Parts([3, 4])
    widths = {"a/0": (3, 3), "a/1": (4, 4)}
    assert examined(model, IMAGES) == widths
    remove_units(prunable_groups(model, IMAGES), {least: list(range(1, widths[least][0]))})
    assert prunable_groups(model, IMAGES).widths == {other: widths[other][0]}
    assert model.sizes == ([1, 4] if least == "a/0" else [3, 1])


@pytest.mark.parametrize("sizes", [[4, 4], (4, 4)])
def test_equal_sizes_are_those_of_the_pieces_one_after_the_other(sizes):
    model = Parts(sizes)
    groups = prunable_groups(model.eval(), IMAGES)
    assert {g.name: [a.name for a in g.attributes] for g in groups} == {"a/0": ["sizes.0"], "a/1": ["sizes.1"]}
    remove_units(groups, {"a/0": [0, 2], "a/1": [1]})
    assert list(model.sizes) == [2, 3] and model(IMAGES).shape == (2, 3)


class Shuffles(nn.Module):
    """Channel shuffles that fix the first factor of a reshape; with four groups of two it looks like the second."""

    def __init__(self, *groups):
        super().__init__()
        self.groups = groups
        widths = [3, *[8] * len(groups)]
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in itertools.pairwise(widths))
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        for layer, groups in zip(self.layers, self.groups, strict=True):
            x = layer(x)
            n, c, *pixels = x.shape
            x = x.view(n, groups, c // groups, *pixels).transpose(1, 2).reshape(n, c, *pixels)
        return self.out(x.mean((2, 3)))


def test_what_verified_groups_removed_is_repeated_by_verified_groups():
    model = Shuffles(4)
    assert examined(model, IMAGES) == {"layers.0": (8, 4)}  # the first answer, which verification refuses
    groups = prunable_groups(model, IMAGES)
    assert {g.name: (g.width, g.n_units) for g in groups} == {"layers.0": (8, 2)}
    pruned, removed = copy.deepcopy(model), {"layers.0": [1]}
    history = PruningHistory.of(groups, removed, remove_units(groups, removed, model=pruned))
    assert history.entries() == [["layers.0", True, [1, 3, 5, 7]]]
    fresh = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"only a part of what goes with them; .* if the groups were verified"):
        repeat(history.entries(), prunable_groups(fresh, IMAGES, verify=False))
    repeat(history.entries(), prunable_groups(fresh, IMAGES))
    assert torch.equal(fresh(IMAGES), pruned(IMAGES))
    repeat(history.entries(direct=True), prunable_groups(copy.deepcopy(model), IMAGES, verify=False))


def test_answers_of_the_verification_last_from_step_to_step():
    """With one slice of the first reshape left nothing shows that it is one; the second keeps its own answer."""
    model = Shuffles(4, 2)
    dense = copy.deepcopy(model.eval())
    pruner = BudgetPruner(model, IMAGES, budget=Budget(macs=0.6), importance=tp.importance.MagnitudeImportance(p=1))
    assert {g.name: (g.width, g.n_units) for g in pruner.groups} == {"layers.0": (8, 2), "layers.1": (8, 4)}
    pruner.apply(pruner.plan_of({"layers.0": [1], "layers.1": [2]}))
    assert {g.name: (g.width, g.n_units) for g in pruner.groups} == {"layers.1": (6, 3)}
    assert ("layers.0", "minimum") in {(e.name, e.kind) for e in pruner.groups.excluded}
    pruner.step(Budget(macs=0.35))
    assert Cost(*count_ops(model, IMAGES)) == pruner.cost_model.dense
    again = BudgetPruner(dense, IMAGES, budget=Budget(macs=0.6), importance=tp.importance.MagnitudeImportance(p=1))
    again.load_pruning_history(pruner.pruning_history())
    assert torch.equal(dense(IMAGES), model(IMAGES)) and again.groups.widths == pruner.groups.widths
    assert [(e.name, e.kind) for e in again.groups.excluded] == [(e.name, e.kind) for e in pruner.groups.excluded]


class Placed(nn.Module):
    """A function between two convolutions."""

    def __init__(self, function, width):
        super().__init__()
        self.function, self.a, self.b = function, nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(width, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.b(self.function(self.a(x))).mean((2, 3)))


@pytest.mark.parametrize(
    ("function", "width"),
    [
        (lambda x: x.roll(1, 1), 16),
        (lambda x: x.roll((1, 1), (1, 2)), 16),
        (lambda x: x.roll(3), 16),
        (lambda x: F.pad(x[:, None], (0, 0, 0, 0, 1, 1), mode="reflect")[:, 0], 18),
        (lambda x: F.pad(x[:, None], (0, 0, 0, 0, 2, 0), mode="replicate")[:, 0], 18),
        (lambda x: x.view(len(x), 4, -1, 4, 4).diagonal(0, 1, 2).movedim(-1, 1), 4),
        (lambda x: x.unfold(1, 2, 2)[..., 0], 8),
        (lambda x: x.movedim(1, -1).tril().movedim(-1, 1), 16),
    ],
    ids=["roll", "roll along two axes", "roll of all", "reflection", "replication", "diagonal", "unfold", "tril"],
)
def test_channels_that_the_code_counts_stay(function, width):
    """Rolled by one, the last channel comes first; without it, the one before it does."""
    groups = prunable_groups(Placed(function, width).eval(), IMAGES, verify=False)
    assert groups.widths == {"b": 4}
    reasons = {e.kind: e.reason for e in groups.excluded if e.name.startswith("a")}
    assert "by their position" in reasons["pinned"]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.roll((1, 2), (2, 3)),
        lambda x: x.flip(1),
        lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
        lambda x: x.diagonal(0, 2, 3)[..., None],
        lambda x: x.tril(),
    ],
    ids=["roll", "flip", "reflection", "diagonal", "tril"],
)
def test_pixels_may_be_counted(function):
    assert examined(Placed(function, 16), IMAGES) == {"a": (16, 16), "b": (4, 4)}


def test_gates_of_single_channels_do_not_pile_up():
    """Each of them is a label for every pixel, and every block handed on twice as many as it was given."""

    class Gates(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.head = nn.Conv2d(3, 8, 1), nn.Linear(8, 3)
            self.gates = nn.ModuleList(nn.Conv2d(8, 1, 1) for _ in range(24))

        def forward(self, x):
            x = self.a(x)
            for gate in self.gates:
                y = torch.sigmoid(gate(x))
                x = x * y + x * (1 - y)
            return self.head(x.mean((2, 3)))

    assert prunable_groups(Gates().eval(), IMAGES).widths == {"a": 8}
