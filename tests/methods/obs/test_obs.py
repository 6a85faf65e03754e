import copy

import numpy as np
import pytest
import torch
from torch import nn

from helpers.catro_cases import PLANTED, X, dead, planted_loader, planted_net
from tp_importance import Budget, BudgetPruner, CATROImportance, OBSImportance, OBSPruner
from tp_importance.maths.moments import Moments
from tp_importance.testing import class_loader, make_network


def curve_of(model, loader=None, name="0", x=X, **options):
    importance = OBSImportance(**options).collect(model, x, planted_loader() if loader is None else loader)
    return importance.curves()[name]


def refitted_loss(model, loader, removed, ridge=1e-9):
    """Residual of the least squares that refits layer 2 on stored activations, per row."""
    seen = []
    handle = model[2].register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with torch.no_grad():
        for x, _ in loader:
            model(x)
    handle.remove()
    u = torch.cat(seen).double().permute(0, 2, 3, 1).flatten(0, 2)
    u = u - u.mean(0)
    left = np.setdiff1d(np.arange(8), removed)
    y = u @ model[2].weight.detach().double().flatten(1).mT
    if not len(left):
        return float(y.square().sum()) / len(u)
    return float((y - u[:, left] @ torch.linalg.lstsq(u[:, left], y).solution).square().sum()) / len(u)


def test_curve_is_the_loss_of_direct_refits():
    model, loader = planted_net(noise=1.0), planted_loader()
    with torch.no_grad():  # enough inputs for eight independent channels
        model[0].weight.copy_(torch.randn(8, 3, 1, 1, generator=torch.Generator().manual_seed(3)))
    curve = curve_of(model, loader, positions=None, ridge=1e-6)
    everything = refitted_loss(model, loader, np.arange(8))
    for left in range(9):
        wanted = refitted_loss(model, loader, curve.removed(left)) / everything
        assert curve.loss[left] == pytest.approx(wanted, rel=1e-3, abs=1e-7)


def test_what_others_can_make_up_for_goes_first():
    """The channel with the largest output is a multiple of another one: it goes for nothing, CATRO keeps it."""
    model = planted_net(noise=1.0)
    with torch.no_grad():
        model[0].weight[0], model[0].bias[0] = 5 * model[0].weight[1], 5 * model[0].bias[1]
    curve = curve_of(model, ridge=1e-6)
    assert curve.order[0] in (0, 1) and curve.loss[7] < 1e-3 * curve.loss[0]
    other = CATROImportance().collect(model, X, planted_loader()).curves()["0"]
    assert 0 in other.order[-2:]


def test_scales_that_keep_the_function_keep_the_order():
    """A batch norm swallows the scale of its convolution, and with it that of the consumer in front of it."""
    model, x = make_network("plain")
    other = copy.deepcopy(model).double()
    norms = [m for m in other.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        for conv, norm in ((m[0], m[1]) for m in other.children() if isinstance(m, nn.Sequential) and m[1] in norms):
            conv.weight *= 3.0
            norm.running_mean *= 3.0
            norm.running_var.copy_(9.0 * (norm.running_var + norm.eps) - norm.eps)
    loader = [(a.double(), y) for a, y in class_loader(n=48)]
    model, x = model.double(), x.double()
    torch.testing.assert_close(model(x), other(x))
    first, second = (OBSImportance().collect(m, x, loader).curves() for m in (model, other))
    assert norms
    for name, curve in first.items():
        assert curve.order.tolist() == second[name].order.tolist()
        np.testing.assert_allclose(second[name].loss, curve.loss, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("class_weight", [0.0, 0.25, 1.0])
def test_planted_channels_survive(class_weight):
    curve = curve_of(planted_net(), class_weight=class_weight)
    assert set(curve.order[-1:]) <= set(PLANTED)  # one can stand in for the other


def test_class_weight_decides_between_classes_and_noise():
    model = planted_net(signal=1.0, noise=3.0)
    assert curve_of(model, class_weight=1.0).order[-1] in PLANTED
    assert curve_of(model, class_weight=0.0).order[-1] not in PLANTED
    half, total = curve_of(model, class_weight=0.5), curve_of(model)
    assert np.array_equal(half.loss, total.loss)


def test_constant_units_go_first_the_smallest_weights_ahead():
    model = dead(planted_net(noise=1.0), [1, 4, 6])
    with torch.no_grad():
        for channel, norm in ((1, 3.0), (4, 1.0), (6, 2.0)):
            model[0].weight[channel] *= norm / model[0].weight[channel].abs().sum()
    curve = curve_of(model)
    assert curve.order[:3].tolist() == [4, 6, 1] and sorted(curve.constant.tolist()) == [1, 4, 6]
    assert not curve.loss[5:].any()
    nothing = curve_of(dead(planted_net(), list(range(8))))
    assert not nothing.loss.any() and len(nothing.constant) == 8


@pytest.mark.parametrize("name", ["grouped", "concat", "residual", "flatten", "transformer_mlp"])
@pytest.mark.parametrize("class_weight", [0.5, 0.8])
def test_losses_never_fall_as_more_goes(name, class_weight):
    model, x = make_network(name)
    importance = OBSImportance(class_weight=class_weight).collect(model, x, class_loader(n=64, shape=x.shape[1:]))
    for curve in importance.curves().values():
        assert (curve.loss >= -1e-9).all() and curve.loss[0] > 0
        assert class_weight != 0.5 or (np.diff(curve.loss) <= 1e-12).all()


def test_wide_consumers_are_taken_by_their_contributions(monkeypatch):
    from tp_importance.statistics import consumers

    model, x = make_network("flatten")
    loader = class_loader(n=64, shape=x.shape[1:])
    exact = OBSImportance(positions=None).collect(model, x, loader).curves()
    monkeypatch.setattr(consumers, "MAX_FEATURES", 20)
    sketched = OBSImportance(positions=None).collect(model, x, loader).curves()
    last = list(exact)[-1]
    assert (sketched[last].loss[1:-1] >= exact[last].loss[1:-1] * (1 - 1e-6)).all()  # it may only scale channels
    assert len(set(sketched[last].order[:8]) & set(exact[last].order[:8])) >= 4


def test_subtask_and_statistics_are_those_of_its_samples():
    model, x = make_network("residual")
    loader = class_loader(n=64)
    mine = [(a[keep], y[keep]) for a, y in loader for keep in [torch.isin(y, torch.tensor([1, 3]))]]
    subtask = OBSImportance(classes=[1, 3], positions=None).collect(model, x, loader)
    filtered = OBSImportance(positions=None).collect(model, x, mine)
    for name, curve in subtask.curves().items():
        np.testing.assert_allclose(curve.loss, filtered.curves()[name].loss, rtol=1e-4)
    consumer = subtask.groups.groups[0].consumers[0].name
    torch.testing.assert_close(
        Moments.total(subtask.consumer_statistics.moments(consumer)),
        Moments.total(filtered.consumer_statistics.moments(consumer)),
        rtol=1e-4,
        atol=1e-6,
    )


def test_a_failed_pass_leaves_the_old_statistics():
    model, x = make_network("plain")
    importance = OBSImportance()
    assert importance.consumer_statistics is None
    before = importance.collect(model, x, class_loader()).consumer_statistics
    with pytest.raises(ValueError, match="finite"):
        importance.collect(model, x, [(a * float("nan"), y) for a, y in class_loader()])
    assert importance.consumer_statistics is before


@pytest.mark.parametrize(
    "options",
    [{"ridge": 0.0}, {"ridge": float("nan")}, {"class_weight": 1.1}, {"positions": 0}, {"positions": True}],
)
def test_refuses(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        OBSImportance(**options)


def test_pruner_passes_its_options_on():
    model, x = make_network("plain")
    pruner = OBSPruner(
        model, x, class_loader(), budget=Budget(macs=0.5), class_weight=0.7, positions=3, ridge=0.1, seed=4
    )
    i = pruner.importance
    assert isinstance(pruner, BudgetPruner) and (i.class_weight, i.positions, i.ridge, i.seed) == (0.7, 3, 0.1, 4)
