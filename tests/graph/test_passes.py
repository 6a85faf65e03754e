"""How often the network runs on its example inputs: every pass of it costs as much as an image."""

import pytest
import torch
from torch import nn

from tp_importance import (
    Budget,
    CATROImportance,
    OBSImportance,
    Refit,
    bake_weights,
    prunable_groups,
    prune,
)
from tp_importance.graph.tracing import trace
from tp_importance.refitting.refit import refit_consumers


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.inner, self.outer = (nn.Conv2d(c, 8, 3, padding=1) for c in (3, 8, 8))
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x).relu()
        x = x + self.outer(self.norm(self.inner(x)).relu())
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out, self.head = (nn.Linear(8, n) for n in (8, 8, 8, 8, 3))

    def forward(self, x):
        q, k, v = (layer(x).unflatten(2, (-1, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head((x + self.out(mixed)).mean(1))


class Counted:
    """Samples of every call of a network and of its copies."""

    def __init__(self, model):
        self.model, self.calls = model, []
        model.register_forward_pre_hook(self)

    def __call__(self, _module, args):
        self.calls.append(len(args[0]))

    def __deepcopy__(self, memo):
        return self  # copies count here, too

    @property
    def of_examples(self):
        return self.calls.count(1)


@pytest.fixture
def counted():
    torch.manual_seed(0)
    return Counted(Residual().eval())


X = torch.randn(1, 3, 6, 6, generator=torch.Generator().manual_seed(0))
LOADER = [(torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(i)), torch.arange(8) % 4) for i in range(3)]


def test_finding_groups_takes_four_passes(counted):
    """With labels, in training mode, masked, pruned."""
    assert prunable_groups(counted.model, X).names
    assert counted.calls == [1] * 4


def test_without_verification_two(counted):
    prunable_groups(counted.model, X, verify=False)
    assert counted.calls == [1] * 2


def test_one_where_training_mode_does_not_matter(counted):
    prunable_groups(counted.model, X, verify=False, allow_stale=True)
    assert counted.calls == [1]


def test_attention_takes_one_more():
    torch.manual_seed(0)
    counted = Counted(Attention().eval())
    assert "q" in prunable_groups(counted.model, torch.randn(1, 5, 8)).names
    assert counted.calls == [1] * 5


def test_computed_weights_are_compared_without_labels():
    """The pass with labels takes them for parameters, so what eval mode reads is written down in another."""
    torch.manual_seed(0)
    model = Residual().eval()
    nn.utils.parametrizations.weight_norm(model.inner)
    counted = Counted(model)
    assert trace(model, X).reads is None
    counted.calls.clear()
    prunable_groups(model, X, verify=False)
    assert counted.calls == [1] * 3
    bake_weights(model, X)
    assert trace(model, X).reads is not None


@pytest.mark.parametrize("importance", [CATROImportance, OBSImportance])
def test_collecting_records_the_network_once(counted, importance):
    """For batch norms behind layers, and for residual sums."""
    importance().collect(counted.model, X, LOADER)
    assert counted.calls == [1] * 5 + [8] * 3


def test_pruning_in_one_call(counted):
    """Groups four, what is behind layers and added up one, also for the refit, the pruned network one."""
    prune(counted.model, X, LOADER, budget=Budget(macs=0.6))
    assert counted.of_examples <= 6


def test_pruning_by_weights_alone(counted):
    """Groups four, the outputs before and after two, the pruned network one."""
    prune(counted.model, X, budget=Budget(macs=0.6), method="l1", refit=None)
    assert counted.calls == [1] * 7


def test_refitting_alone(counted):
    """One pass for what batch norms are behind and for what is added up."""
    groups = prunable_groups(counted.model, X)
    counted.calls.clear()
    refit_consumers(counted.model, X, LOADER, {"inner": [1, 2]}, Refit(), groups=groups)
    assert counted.of_examples <= 1
