import copy

import pytest
import torch
import torch_pruning as tp
from torch import nn

from helpers.states import state
from tp_importance import Budget, BudgetPruner, Refit, prunable_groups, refitted_step
from tp_importance.graph.surgery import remove_units
from tp_importance.refitting.refit import refit_consumers
from tp_importance.testing import class_loader, make_network

MODES = ["parallel", "sequential"]
EXACT = Refit("parallel", ridge=0.0, positions=None, recalibrate=False)


def last_linear(model):
    return [m for m in model.modules() if isinstance(m, nn.Linear)][-1]


def pruner_of(model, x, kind=tp.pruner.BasePruner, **options):
    importance = tp.importance.MagnitudeImportance(p=1)
    options = {"pruning_ratio": 0.5, "ignored_layers": [last_linear(model)], **options}
    return kind(model, x, importance, **options)


def images(x, n=16, seed=3):
    return torch.randn(n, *x.shape[1:], generator=torch.Generator().manual_seed(seed)).to(x)


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=0, msg=key)


class Chosen(tp.importance.Importance):
    """Gives the units of our groups that are to go the lowest scores."""

    def __init__(self, groups, removed):
        self.groups, self.removed = groups, removed

    def __call__(self, group):
        name = self.groups.trace.names.get(group[0].dep.target.module)
        score = torch.linspace(1.0, 2.0, len(group[0].idxs))
        for ours in self.groups:
            member = ours.member(str(name), "out")
            if member is not None and len(member.channels) == len(score):
                score[member.positions(self.removed[ours.name])] -= 5.0
        return score


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("concat", "parallel"),
        ("depthwise", "parallel"),
        ("flatten", "parallel"),
        ("grouped", "sequential"),
        ("transposed", "parallel"),
        ("residual", "sequential"),
    ],
)
def test_a_host_pruner_gives_what_our_surgery_gives(name, mode):
    model, x = make_network(name)
    twin, data = copy.deepcopy(model), class_loader(32)
    groups = prunable_groups(model, x)
    removed = {g.name: list(range(0, 2 * (g.n_units // 2), 2)) for g in groups}  # half of the units
    pruner = tp.pruner.BasePruner(
        model, x, Chosen(groups, removed), pruning_ratio=0.5, ignored_layers=[last_linear(model)]
    )
    settings = Refit(mode, recalibrate=False)
    report = refitted_step(pruner, x, data, settings)
    twins = prunable_groups(twin, x)
    by_hand = refit_consumers(twin, x, data, removed, settings, groups=twins)
    remove_units(twins, removed)
    assert report == by_hand and report.rows and not any(r.skipped for r in report.rows)
    assert_same(state(model), state(twin))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (tp.pruner.MetaPruner, {"iterative_steps": 2}),
        (tp.pruner.BNScalePruner, {"global_pruning": True}),
        (tp.pruner.GroupNormPruner, {}),
    ],
)
def test_any_pruner_of_the_host(kind, options):
    model, x = make_network("residual")
    data = images(x)
    plain = copy.deepcopy(model)
    pruner, other = (pruner_of(m, x, kind, **options) for m in (model, plain))
    for _ in range(options.get("iterative_steps", 1)):
        report = refitted_step(pruner, x, [data], EXACT)
        assert report.rows and all(r.after < r.before for r in report.rows)
        other.step()
    fresh = {k: v.shape for k, v in make_network("residual")[0].state_dict().items()}
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (model, plain)]
    assert shapes[0] == shapes[1] != fresh
    assert not any(
        torch.equal(model.get_submodule(r.name).weight, plain.get_submodule(r.name).weight) for r in report.rows
    )


@pytest.mark.parametrize("mode", MODES)
def test_what_is_not_masking_is_reported_and_left_as_the_host_left_it(mode):
    model, x = make_network("padded_shortcut")
    plain = copy.deepcopy(model)
    report = refitted_step(pruner_of(model, x), x, class_loader(32), mode)
    pruner_of(plain, x).step()
    skipped = {r.name: r.skipped for r in report.rows if r.skipped}
    parts = "it loses channels that cannot be accounted for (only parts of units of features.0.0 go, "
    assert skipped and all(reason.startswith(parts) for reason in skipped.values())
    for layer in skipped:
        assert torch.equal(model.get_submodule(layer).weight, plain.get_submodule(layer).weight)
    for row in report.rows:
        if not row.skipped:
            assert row.after < row.before
            assert not torch.equal(model.get_submodule(row.name).weight, plain.get_submodule(row.name).weight)


class Broken(list):
    def __iter__(self):
        yield from super().__iter__()
        raise OSError("disk")


@pytest.mark.parametrize("mode", MODES)
def test_the_model_is_unchanged_after_an_exception(mode):
    model, x = make_network("plain")
    before, shapes = state(model), repr(model)
    with pytest.raises(OSError, match="disk"):
        refitted_step(pruner_of(model, x), x, Broken(class_loader(32)), mode)
    assert_same(state(model), before)
    assert repr(model) == shapes and model(x).shape == (2, 4)


def test_recalibration_and_modes():
    model, x = make_network("plain")
    mean = model[0][1].running_mean.clone()
    pruner = pruner_of(model, x)  # leaves the model in eval mode
    model.train()
    refitted_step(pruner, x, class_loader(32), refit="parallel")
    assert model.training and not torch.equal(model[0][1].running_mean, mean[: len(model[0][1].running_mean)])
    with pytest.raises(TypeError, match="refits nothing"):
        refitted_step(pruner_of(model, x), x, class_loader(32), None)


def test_the_model_is_unchanged_if_recalibration_fails():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(16, 4)
    before = state(model)
    pruner = tp.pruner.BasePruner(
        model, x[:2], tp.importance.MagnitudeImportance(), pruning_ratio=0.5, ignored_layers=[model[3]]
    )
    with pytest.raises(ValueError, match="variance"):  # a batch of one sample
        refitted_step(pruner, x[:2], [x[:1], x], "parallel")
    assert_same(state(model), before)


@pytest.mark.parametrize(("name", "layer"), [("plain", "3.2"), ("residual", "3.2"), ("no_bn", None)])
def test_outputs_of_the_network_are_not_cut_off(name, layer):
    model, x = make_network(name)
    layer = layer or {m: n for n, m in model.named_modules()}[last_linear(model)]
    before = state(model)
    with pytest.raises(ValueError, match=rf"\(2, 4\).* became .*\(2, 2\).*ignored_layers: \['{layer}'\]"):
        refitted_step(
            pruner_of(model, x, ignored_layers=[]), x, [images(x)], refit=Refit("parallel", recalibrate=False)
        )
    assert_same(state(model), before)
    assert refitted_step(
        pruner_of(model, x), x, [images(x)], refit=Refit("parallel", recalibrate=False)
    ).rows  # and as the message says it works


def test_pruners_of_another_kind_are_refused():
    model, x = make_network("plain")
    importance = tp.importance.MagnitudeImportance()
    ours = BudgetPruner(model, x, importance=importance, budget=Budget(macs=0.5))
    with pytest.raises(TypeError, match=r"BudgetPruner refits by itself: call pruner.step\(refit="):
        refitted_step(ours, x, [images(x)], refit=Refit("parallel", recalibrate=False))
    for wrong, given in ((importance, "of type MagnitudeImportance"), (tp.pruner.BasePruner, "the class BasePruner")):
        with pytest.raises(TypeError, match=f"pruner is {given}; give a pruner of Torch-Pruning"):
            refitted_step(wrong, x, [images(x)], refit=Refit("parallel", recalibrate=False))
