"""Batch norm statistics moved by the change that pruning makes: the reference, its channels, and no change."""

import copy
import warnings

import pytest
import torch
import torch_pruning as tp
from torch import nn

from tp_importance import (
    Budget,
    BudgetPruner,
    CATROImportance,
    Refit,
    ResConvPruner,
    prunable_groups,
    prune,
    recalibrate_batchnorm,
    refitted_step,
)
from tp_importance.automl import prune_trial
from tp_importance.graph.surgery import remove_units
from tp_importance.graph.verify import sample_units
from tp_importance.maths.batchnorm import ChannelMoments as Moments
from tp_importance.maths.batchnorm import follow_change
from tp_importance.statistics.dense_reference import DenseReference
from tp_importance.testing import Snapshot, class_loader, loader_for, make_network, same_values
from tp_importance.testing.networks import conv_bn_relu, head
from tp_importance.testing.surgery import moved_statistics, norm_inputs

HALF = Budget(macs=0.5)


def trained(name="residual"):
    """A network whose statistics are not those of the images."""
    model, x = make_network(name)
    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.running_mean.add_(0.3)
            norm.running_var.mul_(1.7)
    return model.eval(), x


def pruned(model, x):
    """A pruned copy, the units that went, and the channels of every batch norm that are left."""
    twin = copy.deepcopy(model)
    groups = prunable_groups(twin, x, verify=False)
    removed, kept = sample_units(groups), {}
    for name, norm in model.named_modules():
        if isinstance(norm, nn.BatchNorm2d):
            gone = [p for g in groups for m in g.members if m.name == name for p in m.positions(removed[g.name])]
            kept[name] = sorted(set(range(norm.num_features)) - set(gone))
    remove_units(groups, removed)
    return twin, removed, kept


def test_a_shift_and_scale_is_followed_exactly_and_twice_is_once():
    x = torch.randn(300, 4, dtype=torch.float64)
    scale, shift = torch.tensor([2.0, 0.1, 1.0, 30.0]).double(), torch.tensor([0.0, 3.0, -1.0, 2.0]).double()
    mean, var = torch.randn(4), torch.rand(4) + 0.5
    dense, halfway, now = (Moments.of(t) for t in (x, x * 0.5 - 1, x * scale + shift))
    new_mean, new_var = follow_change(mean, var, dense, now)
    torch.testing.assert_close(new_mean, mean.double() * scale + shift)
    torch.testing.assert_close(new_var, var.double() * scale.square())
    twice = follow_change(*follow_change(mean, var, dense, halfway), halfway, now)
    torch.testing.assert_close(twice[0], new_mean)
    torch.testing.assert_close(twice[1], new_var)


def test_channels_that_the_images_do_not_excite():
    x = torch.randn(200, 3, dtype=torch.float64) * torch.tensor([1.0, 0.0, 0.0])
    moved = x + torch.tensor([0.0, 2.0, 0.0]) + torch.randn(200, 3) * torch.tensor([0.0, 0.0, 3.0])
    dense, now = Moments.of(x), Moments.of(moved)
    mean, var = follow_change(torch.ones(3), torch.full((3,), 2.0), dense, now)
    assert torch.isfinite(mean).all() and torch.isfinite(var).all()
    assert mean[1] == 3.0 and var[1] == 2.0  # constant before and after: its mean follows, its variance stays
    torch.testing.assert_close(var[2], 2.0 + now.variance[2])  # it was constant and is not any more
    died = follow_change(torch.ones(1), torch.ones(1), Moments.of(x[:, :1]), Moments.of(x[:, 1:2]))
    moved_by = -float(Moments.of(x[:, :1]).mean)  # constant at 0 from now on: nothing else is amplified there
    assert float(died[0]) == pytest.approx(1.0 + moved_by) and float(died[1]) == 1.0


@pytest.mark.parametrize("name", ["plain", "residual", "depthwise", "concat"])
def test_any_host_with_a_copy_as_reference(name):
    model, x = trained(name)
    twin, _removed, kept = pruned(model, x)
    before, batches = copy.deepcopy(twin), [a for a, _ in loader_for(x)]
    snapshot = Snapshot(model)
    assert recalibrate_batchnorm(twin, batches, reference=model) is twin
    snapshot.check()
    for path, norm in model.named_modules():
        if isinstance(norm, nn.BatchNorm2d):
            both = (norm_inputs(net, path, batches) for net in (model, before))
            mean, var = moved_statistics(norm, kept[path], *both)
            now = twin.get_submodule(path)
            torch.testing.assert_close(now.running_mean, mean)
            torch.testing.assert_close(now.running_var, var)
            assert now.num_batches_tracked == norm.num_batches_tracked


def test_the_same_network_keeps_its_statistics_bit_for_bit():
    model, x = trained()
    twin = copy.deepcopy(model).train()
    recalibrate_batchnorm(twin, [a for a, _ in loader_for(x)], reference=model)
    assert same_values(twin, model) and twin.training


@pytest.mark.parametrize("kind", ["layer", "trained", "alike"])
def test_references_that_do_not_fit_name_the_layer(kind):
    model, x = trained()
    twin, *_ = pruned(model, x)
    narrowed = next(n for n, m in twin.named_modules() if isinstance(m, nn.BatchNorm2d) and m.num_features == 5)
    if kind == "layer":
        model.get_submodule(narrowed.rpartition(".")[0])[int(narrowed[-1])] = nn.Identity()
    with torch.no_grad():
        if kind == "trained":
            twin.get_submodule(narrowed).weight.add_(0.1)
        if kind == "alike":
            for net in (model, twin):
                norm = net.get_submodule(narrowed)
                norm.weight.fill_(1), norm.bias.fill_(0), norm.running_var.fill_(1)
    snapshot = Snapshot(twin)
    remedy = "copy.deepcopy" if kind == "layer" else "right after pruning"
    with pytest.raises(ValueError, match=f"layer '{narrowed}'.*{remedy}"):
        recalibrate_batchnorm(twin, [a for a, _ in loader_for(x)], reference=model)
    snapshot.check()


def test_channels_without_gain_may_be_alike():
    old, new = nn.BatchNorm1d(5), nn.BatchNorm1d(3)
    with torch.no_grad():
        for norm, weight in ((old, [1.0, 0, 0, 0, 2]), (new, [1.0, 0, 2])):
            norm.weight.copy_(torch.tensor(weight))
    reference = DenseReference.matched(nn.Sequential(old), nn.Sequential(new))
    assert reference.kept["0"].tolist() == [0, 1, 4]


def make(model, x, **options):
    return BudgetPruner(model, x, class_loader(32), importance=CATROImportance(), budget=HALF, verify=False, **options)


def test_the_reference_over_steps_is_the_network_as_given():
    """One step, two, and two of which only the second recalibrates: all move from the network as given."""
    statistics = []
    plans = None
    for steps in ("both", "second"):
        model, x = trained()
        pruner = make(model, x)
        first = pruner.plan(Budget(macs=0.7))
        pruner.apply(first, refit="batchnorm" if steps == "both" else None)
        second = pruner.plan()
        plans = (first, second) if plans is None else plans
        pruner.apply(replaced(second, plans[1]), refit="batchnorm")
        statistics.append([b.clone() for b in model.buffers()])
    for a, b in zip(*statistics, strict=True):
        torch.testing.assert_close(a, b)


def replaced(plan, by):
    assert plan.widths.keys() == by.widths.keys()
    return by


def test_training_between_steps_makes_a_new_reference():
    model, x = trained()
    pruner = make(model, x)
    pruner.step(Budget(macs=0.7), refit="batchnorm")
    first = pruner.target._reference.model
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    model(x).square().mean().backward()
    optimizer.step()
    model.eval()
    now = copy.deepcopy(model)
    pruner.step(refit="batchnorm")
    assert pruner.target._reference.model is not first and same_values(pruner.target._reference.model, now)


@pytest.mark.parametrize("budget", [Budget(macs=1.0), Budget(macs=10**9), Budget(params=1.0)])
@pytest.mark.parametrize("method", ["obs", "l1", "itpruner"])
@pytest.mark.parametrize("refit", ["sequential", "parallel", "batchnorm"])
def test_nothing_to_prune_changes_nothing(budget, method, refit):
    model, x = trained()
    snapshot = Snapshot(model)
    with pytest.warns(UserWarning, match="nothing is pruned"):
        report = prune(model, x, class_loader(32), budget=budget, method=method, refit=refit).report
    snapshot.check()
    assert report.cost == report.dense


def test_nothing_to_prune_in_a_trial_changes_nothing():
    model, x = trained()
    kept = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prune_trial(
            model,
            {"method": "l1"},
            example_inputs=x,
            loader=class_loader(32),
            evaluate=lambda net: 0.0,
            budget=Budget(macs=1.0),
            latency_seconds=None,
            keep=kept.append,
        )
    assert same_values(kept[0], model)


def test_a_trial_moves_statistics_as_a_step_does():
    model, x = trained()
    kept = []
    options = {"example_inputs": x, "loader": class_loader(32), "evaluate": lambda net: 0.0, "latency_seconds": None}
    prune_trial(model, {"method": "l1"}, budget=HALF, keep=kept.append, **options)
    prune(model, x, class_loader(32), budget=HALF, method="l1", refit="batchnorm")
    assert same_values(kept[0], model)


def test_a_host_s_step_moves_statistics():
    model, x = trained()
    dense = copy.deepcopy(model)
    batches = [a for a, _ in loader_for(x)]
    options = {"pruning_ratio": 0.5, "ignored_layers": [m for m in model.modules() if isinstance(m, nn.Linear)]}
    plain = copy.deepcopy(model)
    ignored = [m for m in plain.modules() if isinstance(m, nn.Linear)]
    importance = tp.importance.MagnitudeImportance()
    refitted_step(
        tp.pruner.BasePruner(plain, x, importance, pruning_ratio=0.5, ignored_layers=ignored),
        x,
        batches,
        Refit("parallel", recalibrate=False),
    )
    recalibrate_batchnorm(plain, batches, reference=dense)
    pruner = tp.pruner.BasePruner(model, x, importance, **options)
    refitted_step(pruner, x, batches, "parallel")
    for a, b in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_reference_is_checked_where_widths_are_equal_too():
    model, x = trained()
    twin = copy.deepcopy(model)
    norm = next(m for m in twin.modules() if isinstance(m, nn.BatchNorm2d))
    order = torch.randperm(norm.num_features, generator=torch.Generator().manual_seed(0))
    for tensor in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
        tensor.copy_(tensor[order].clone())
    with pytest.raises(ValueError, match="cannot be told among"):
        recalibrate_batchnorm(twin, [a for a, _ in loader_for(x)], reference=model)


@pytest.mark.parametrize("reference", [{"0.weight": torch.zeros(1)}, "dense", nn.Linear])
def test_what_is_no_reference(reference):
    model, x = trained()
    with pytest.raises(TypeError, match=r"reference must be a torch\.nn\.Module"):
        recalibrate_batchnorm(model, [x], reference=reference)


def test_a_forward_function_must_call_the_model_it_gets():
    model, x = trained()
    snapshot = Snapshot(model)
    with pytest.raises(ValueError, match="forward_fn must call the model it gets"):
        dense = copy.deepcopy(model)
        recalibrate_batchnorm(model, [x], reference=dense, forward_fn=lambda _net, batch: model(batch))
    snapshot.check()


class Cached(nn.Module):
    """Normalises by the norm of its weight, which it keeps in eval mode, as LeViT does with its biases."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.calls = nn.Linear(16, 4), None, 0

    def train(self, mode=True):
        self.norm = None
        return super().train(mode)

    def forward(self, x):
        self.calls += 1
        if not self.training and self.norm is None:
            self.norm = self.linear.weight.detach().norm()
        return self.linear(x) / (self.linear.weight.norm() if self.training else self.norm)


@pytest.mark.parametrize("refit", ["sequential", "parallel", "batchnorm"])
def test_passes_leave_no_cache_behind(refit):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), Cached()).eval()
    prune(model, torch.randn(2, 3, 12, 12), class_loader(32), budget=HALF, method="l1", refit=refit)
    assert model[8].norm is None and model[8].calls == 0


def test_converted_layers_name_their_own_way():
    model = nn.Sequential(*(conv_bn_relu(8 if i else 3, 8) for i in range(3)), head(8)).eval()
    dense, x = copy.deepcopy(model), torch.randn(2, 3, 16, 16)
    ResConvPruner(model, x, budget=Budget(macs=0.95), importance="output")
    with pytest.raises(ValueError, match=r"ResConvPruner\(\.\.\.\)\.step\(refit='batchnorm'\)"):
        recalibrate_batchnorm(model, class_loader(32), reference=dense)
