"""Residual stages that padded shortcuts widen: kept under uniform widths, weighed by every other allocator."""

import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import nn

from tp_importance import Budget, BudgetPruner, count_ops, prunable_groups
from tp_importance.errors import BudgetError

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
STAGE = "stem"


class Padded(nn.Module):
    """Two stages of 8 and 16 channels; 4 of the second one meet padding on either side."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
        self.b = nn.Sequential(nn.Conv2d(8, 16, 3, 2, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1))
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x)
        x = (x + self.a(x)).relu()
        x = (F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)) + self.b(x)).relu()
        return self.head(x.mean((2, 3)))


class Projected(Padded):
    """The same with a convolution in the shortcut."""

    def __init__(self):
        super().__init__()
        self.shortcut = nn.Conv2d(8, 16, 1, 2)

    def forward(self, x):
        x = self.stem(x)
        x = (x + self.a(x)).relu()
        return self.head((self.shortcut(x) + self.b(x)).relu().mean((2, 3)))


def padded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Padded().eval()


def pruner(model=None, *, allocator="uniform", macs=0.6, **options):
    return BudgetPruner(
        padded() if model is None else model,
        X,
        importance=tp.importance.MagnitudeImportance(p=2),
        budget=Budget(macs=macs),
        allocator=allocator,
        **options,
    )


def test_which_groups_they_are():
    groups = prunable_groups(padded(), X)
    assert groups.widths == {STAGE: 8, "a.0": 8, "b.0": 16} and groups.padded == [STAGE]
    assert next((e.kind, e.layers) for e in groups.excluded) == ("pinned", ["b.2"])
    projected = prunable_groups(Projected(), X)
    assert projected.widths[STAGE] == 8 and not projected.padded


@pytest.mark.parametrize(
    ("allocator", "keep", "kept"),
    [
        ("uniform", None, True),
        ("uniform", True, True),
        ("uniform", False, False),
        (None, None, True),  # of magnitudes: uniform
        ("greedy", None, False),
        ("greedy", True, True),
        ("greedy", False, False),
    ],
)
def test_who_keeps_them(allocator, keep, kept):
    model = padded()
    with torch.no_grad():
        for layer in (model.stem, model.a[2], model.b[2]):
            layer.weight.mul_(1e-3)  # greedy takes what is small
    width = pruner(model, allocator=allocator, keep_padded=keep).plan().widths[STAGE]
    assert (width == 8) is kept


def test_a_budget_that_cannot_be_met_without_them():
    dense = count_ops(padded(), X)[0]
    least = pruner(keep_padded=True, macs=0.99).space.floor
    floor = pruner(macs=0.99)
    smallest = floor.cost_model.spent(least, ["macs"])["macs"] / dense
    held, pruned = pruner(macs=smallest).plan(), pruner(macs=0.9 * smallest).plan()
    assert held.widths[STAGE] == 8 and pruned.widths[STAGE] < 8 and pruned.cost.macs <= 0.9 * smallest * dense
    with pytest.raises(BudgetError, match="set keep_padded=False"):
        pruner(macs=0.9 * smallest, keep_padded=True).plan()


def test_what_the_user_says_of_the_group_goes_first():
    assert pruner(max_widths={STAGE: 4}).plan().widths[STAGE] <= 4
    assert pruner(keep_padded=True, max_widths={STAGE: 4}).plan().widths[STAGE] <= 4


def test_later_steps_keep_them_too():
    model = padded()
    both = pruner(model)
    both.step(Budget(macs=0.8))
    report = both.step(Budget(macs=0.6))
    assert {row.name: row.after for row in report.rows}[STAGE] == 8 == model.stem.out_channels
    assert report.cost.macs == count_ops(model, X)[0] and model.a[0].out_channels < 8


@pytest.mark.parametrize("value", ["x", [STAGE], 1])
def test_what_keep_padded_does_not_take(value):
    """A list of groups would have meant all of them."""
    with pytest.raises(TypeError, match="keep_padded must be True, False or None"):
        pruner(keep_padded=value)
