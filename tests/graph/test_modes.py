"""Layers that run in training mode only: their inputs are not pruned behind their back."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import nn
from torchvision import models

from nni_plugins import ImportancePruner, speedup
from tp_importance import (
    Budget,
    BudgetPruner,
    CATROImportance,
    PSAPPruner,
    PSAPSchedule,
    Refit,
    prunable_groups,
    prune,
    refitted_step,
)
from tp_importance.testing import Snapshot, class_loader
from tp_importance.testing.networks import conv_bn_relu, head, plain, randomise_batchnorm

X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Stages(nn.Module):
    """Three convolutions; subclasses say what else training mode does."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = conv_bn_relu(3, 8), conv_bn_relu(8, 12), conv_bn_relu(12, 16)
        self.head = head(16)

    def forward(self, x):
        early = self.a(x)
        middle = self.b(early)
        late = self.c(middle)
        return self.both(early, middle, late, self.head(late))


class AuxHead(Stages):
    """As GoogLeNet: another output in training mode."""

    def __init__(self):
        super().__init__()
        self.aux = head(12)

    def both(self, early, middle, late, output):
        return (output, self.aux(middle)) if self.training else output


class KeptOutput(AuxHead):
    """The auxiliary output is an attribute; what the network returns is the same in both modes."""

    def both(self, early, middle, late, output):
        if self.training:
            self.auxiliary = self.aux(middle)
        return output


class SharedHead(Stages):
    """One classifier for two stages: all layers run in eval mode, too."""

    def __init__(self):
        super().__init__()
        self.b, self.c = conv_bn_relu(8, 16), conv_bn_relu(16, 16)

    def both(self, early, middle, late, output):
        return (output, self.head(middle)) if self.training else output


class RawWeight(Stages):
    """No module is called, only a parameter is read."""

    def __init__(self):
        super().__init__()
        self.projection = nn.Parameter(torch.randn(5, 12))

    def both(self, early, middle, late, output):
        return (output, middle.mean((2, 3)) @ self.projection.t()) if self.training else output


class FunctionalWeight(AuxHead):
    """The layer is never called as a module."""

    def both(self, early, middle, late, output):
        return (output, F.linear(middle.mean((2, 3)), self.aux[2].weight)) if self.training else output


class NormInTraining(Stages):
    """What is read only in training is a norm: it carries the channels."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(12)

    def both(self, early, middle, late, output):
        return (output, self.norm(middle).mean()) if self.training else output


STALE = {
    AuxHead: ("b.0", "aux.2"),
    KeptOutput: ("b.0", "aux.2"),
    SharedHead: ("b.0", "head.2"),
    RawWeight: ("b.0", "projection"),
    NormInTraining: ("b.0", "norm"),
}


def network(kind):
    torch.manual_seed(0)
    model = kind()
    randomise_batchnorm(model, X)
    return model


@pytest.mark.parametrize("kind", STALE)
def test_what_training_alone_reads_is_left_alone(kind):
    model, (group, consumer) = network(kind), STALE[kind]
    snapshot = Snapshot(model)
    groups = prunable_groups(model, X)
    snapshot.check()
    left = {e.name: e.reason for e in groups.excluded}
    assert group in left and f"{consumer} reads it in training mode only" in left[group]
    assert "allow_stale=True" in left[group]
    expected = {"a.0", "b.0", "c.0"} - {group} - ({"c.0"} if kind is SharedHead else set())
    assert set(groups.names) == expected
    BudgetPruner(model, X, budget=Budget(macs=0.8), importance=tp.importance.MagnitudeImportance(p=1)).step()
    assert model.a[0].out_channels < 8
    model.train()(X)


def test_functional_use_of_a_module_counts():
    groups = prunable_groups(network(FunctionalWeight), X)
    assert groups.names == ["a.0", "c.0"]
    reasons = {e.name: e.reason for e in groups.excluded}
    assert "a function of aux.2.weight reads it in training mode only" in reasons["b.0"]


@pytest.mark.parametrize("kind", STALE)
def test_left_stale_if_the_user_says_so(kind):
    model = network(kind)
    assert prunable_groups(model, X, allow_stale=True).names == ["a.0", "b.0", "c.0"]
    BudgetPruner(
        model, X, budget=Budget(macs=0.3), importance=tp.importance.MagnitudeImportance(p=1), allow_stale=True
    ).step()
    model.eval()(X)
    with pytest.raises(RuntimeError):
        model.train()(X)


def loader():
    return class_loader(n=32)


def by_budget_pruner(model):
    BudgetPruner(model, X, budget=Budget(macs=0.7), importance=tp.importance.MagnitudeImportance(p=1)).step()


def repeatedly(model):
    pruner = BudgetPruner(model, X, budget=Budget(macs=0.7), importance=tp.importance.MagnitudeImportance(p=1))
    pruner.step(Budget(macs=0.8))
    pruner.step()


def by_prune(model):
    prune(model, X, loader(), budget=Budget(macs=0.7))


def by_psap(model):
    pruner = PSAPPruner(model, X, budget=Budget(macs=0.7), schedule=PSAPSchedule(prune_steps=2, pulse=1))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    pruner.start(optimizer, total_steps=8)
    model.train()
    for images, labels in loader() * 4:
        optimizer.zero_grad()
        sum(F.cross_entropy(y, labels) for y in model(images)).backward()
        optimizer.step()
        pruner.step()
    pruner.finish()


def by_nni(model):
    config = [{"op_types": ["Conv2d"], "sparse_ratio": 0.3}]
    with pytest.warns(UserWarning, match="reads it in training mode only"):
        pruner = ImportancePruner(model, config, loader=loader(), importance=CATROImportance(), example_inputs=X)
    assert "b.0" in pruner.left_out
    _, masks = pruner.compress()
    pruner.unwrap_model()
    speedup(model, X, masks)


@pytest.mark.parametrize("route", [by_budget_pruner, repeatedly, by_prune, by_psap, by_nni])
def test_every_route_leaves_a_network_that_trains(route):
    model = network(AuxHead)
    route(model)
    assert model.a[0].out_channels < 8 and model.b[0].out_channels == 12
    output, auxiliary = model.train()(X)
    assert output.shape == auxiliary.shape == (4, 4)
    assert model.eval()(X).shape == (4, 4)


def test_a_hosts_step_that_cuts_them_is_refused():
    model = network(AuxHead)
    ignored = [model.head[2], model.aux[2]]
    snapshot = Snapshot(model)

    def pruner(layers):
        return tp.pruner.BasePruner(model, X, tp.importance.MagnitudeImportance(), 0.5, ignored_layers=layers)

    with pytest.raises(ValueError, match=r"aux\.2 reads it in training mode only.*ignored_layers: \['b\.0'\]"):
        refitted_step(pruner(ignored), X, loader(), refit=Refit("parallel", recalibrate=False))
    snapshot.check()
    twin = copy.deepcopy(model)
    refitted_step(pruner([*ignored, model.b[0]]), X, loader(), refit=Refit("parallel", recalibrate=False))
    model.train()(X)
    host = tp.pruner.BasePruner(twin, X, tp.importance.MagnitudeImportance(), 0.5, ignored_layers=[twin.head[2]])
    refitted_step(host, X, loader(), allow_stale=True, refit=Refit("parallel", recalibrate=False))
    assert twin.b[0].out_channels == 6


# --- what is not refused ----------------------------------------------------------------------------------------------


class Unused(AuxHead):
    """A classifier that nobody calls."""

    def both(self, early, middle, late, output):
        return output


class NoisyTraining(Stages):
    """Training mode does other things, but reads nothing more."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def both(self, early, middle, late, output):
        if self.training:
            self.mean.lerp_(middle.detach().mean(), 0.1)
            output = output + 0.01 * sum(p.square().sum() for p in self.c.parameters())
        return F.dropout(output, training=self.training)


@pytest.mark.parametrize("kind", [Unused, NoisyTraining])
def test_others_are_pruned_as_before(kind):
    assert prunable_groups(network(kind), X).names == ["a.0", "b.0", "c.0"]


def test_one_example_is_enough():
    model = network(AuxHead)
    model.aux.insert(1, nn.BatchNorm2d(12))  # on a single value per channel
    groups = prunable_groups(model, X[:1])
    assert groups.names == ["a.0", "c.0"]


# --- networks that do not run in training mode ------------------------------------------------------------------------


class NeedsTargets(AuxHead):
    def forward(self, x, targets=None):
        if self.training and targets is None:
            raise TypeError("targets are missing")
        return super().forward(x)


class NeedsTargetsOnly(NeedsTargets):
    """Everything runs in eval mode, though some of it not as a module."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.table = nn.ParameterList([nn.Parameter(torch.randn(4, 4))])

    def both(self, early, middle, late, output):
        tokens = output.unsqueeze(1)
        output = output + self.attention(tokens, tokens, tokens)[0].squeeze(1)
        return F.linear(output, self.aux[2].weight[:, :4]) @ self.table[0]


def test_layers_that_nobody_can_follow_are_named():
    model = network(NeedsTargets)
    snapshot = Snapshot(model)
    with pytest.raises(ValueError, match=r"aux: eval mode does not run them.*targets are missing.*model\.aux = None"):
        prunable_groups(model, X)
    snapshot.check()
    assert prunable_groups(model, X, allow_stale=True).names == ["a.0", "b.0", "c.0"]
    run = lambda m, x: m(x, targets=0)  # noqa: E731
    assert prunable_groups(model, X, forward_fn=run).names == ["a.0", "c.0"]
    model.aux = None
    assert prunable_groups(model, X).names == ["a.0", "b.0", "c.0"]


def test_what_eval_mode_reads_as_functions_is_not_idle():
    assert prunable_groups(network(NeedsTargetsOnly), X).names == ["a.0", "b.0", "c.0"]


def test_plain_networks_have_no_such_layers():
    assert prunable_groups(plain(), X).names == ["0.0", "1.0", "2.0"]


# --- torchvision ------------------------------------------------------------------------------------------------------


def test_googlenet_with_auxiliary_heads():
    torch.manual_seed(0)
    model = models.googlenet(weights=None, aux_logits=True, init_weights=False, num_classes=4)
    x = X[:1].repeat(1, 1, 4, 4)
    groups = prunable_groups(model, x, verify=False)
    left = {e.name: e.reason for e in groups.excluded if "training mode" in e.reason}
    branches = ("branch1", "branch2.1", "branch3.1", "branch4.1")
    assert set(left) == {f"inception4{stage}.{branch}.conv" for stage in "ad" for branch in branches}
    assert all(f"aux{1 if '4a' in name else 2}.conv.conv" in reason for name, reason in left.items())
    importance = tp.importance.MagnitudeImportance(p=1)
    pruner = BudgetPruner(model, x, importance=importance, budget=Budget(macs=0.5), verify=False)
    assert pruner.step().cost.macs <= 0.5 * pruner.dense.macs
    assert [y.shape for y in model.train()(x.repeat(2, 1, 1, 1))] == [(2, 4)] * 3


class Watchful(nn.Module):
    """Two layers with a mean over channels between them, and what training mode does besides."""

    def __init__(self, training):
        super().__init__()
        self.norm, self.a, self.b, self.c = Centred(), nn.Linear(6, 12), nn.Linear(12, 16), nn.Linear(16, 4)
        self.how, self.watched = training, torch.zeros(())

    def forward(self, x):
        x = self.a(x)
        if self.training and self.how == "before":
            self.watched = x.mean(-1).var()
        if self.how == "order":
            self.watched = x.mean(0) if self.training else x.mean()
        if self.how == "module":
            self.watched, x = x.mean(-1).var(), self.norm(x)
        else:
            x = x - x.mean(-1, keepdim=True)
        if self.training and self.how == "after":
            self.watched = x.mean()
        if self.training and self.how == "again":
            self.watched = self.norm(self.norm(x))
        if not self.training and self.how == "eval only":
            self.watched = F.normalize(x, dim=-1)
        return self.c(F.relu(self.b(x)))


class Centred(nn.Module):
    def forward(self, x):
        return x - x.mean(-1, keepdim=True)


@pytest.mark.parametrize("training", ["before", "module", "after", "again", "eval only"])
def test_statistics_are_the_same_in_both_modes(training):
    """A mask finds its statistic by the number of the call, which training must not change."""
    x = torch.randn(3, 6)
    groups = prunable_groups(Watchful(training), x)
    if training != "before":
        assert groups.names == ["a", "b"]
        return
    assert groups.names == ["b"]
    (left,) = (e for e in groups.excluded if e.kind == "training")
    assert left.name == "a" and "mean in the network" in left.reason and "allow_stale" in left.reason
    assert prunable_groups(Watchful(training), x, allow_stale=True).names == ["a", "b"]
