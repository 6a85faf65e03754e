"""CATRO: what survives, constant channels, statistics."""

import numpy as np
import pytest
import torch
from torch import nn

from helpers.catro_cases import PLANTED, SPACES, X, dead, order_of, planted_loader, planted_net
from tp_importance import Budget, CATROImportance, CATROPruner, count_ops
from tp_importance.methods.catro.trace_ratio import ClassScatter, select
from tp_importance.testing import class_loader, make_network

# --- what survives ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("class_weight", [0.0, 0.5, 1.0])
def test_planted_channels_survive_where_they_are_read(class_weight):
    assert set(order_of(planted_net(), class_weight=class_weight)[-2:]) == set(PLANTED)


@pytest.mark.parametrize("pool", [True, False])
@pytest.mark.parametrize("ratio", ["min", "full"])
def test_planted_channels_survive_in_their_own_space(pool, ratio):
    for noise in (0.01, 1.0, 100.0):  # who reads them does not matter here
        order = order_of(planted_net(noise=noise), space="channel", pool=pool, ratio=ratio)
        assert set(order[-2:]) == set(PLANTED)


@pytest.mark.parametrize("space", SPACES)
def test_pruner_keeps_the_planted_channels(space):
    model = planted_net()
    filters = model[0].weight.clone()
    pruner = CATROPruner(model, X, planted_loader(), budget=Budget(macs=0.45), space=space)
    pruner.step()
    kept = [next(i for i in range(8) if torch.equal(filters[i], w)) for w in model[0].weight]
    assert 2 <= len(kept) < 8 and set(PLANTED) <= set(kept)


def test_class_weight_decides_between_classes_and_noise():
    model = planted_net(signal=1.0, noise=3.0)  # the noise has more energy than the classes
    assert set(order_of(model, class_weight=1.0)[-2:]) == set(PLANTED)
    assert set(order_of(model, class_weight=0.0)[:2]) == set(PLANTED)


def test_half_is_the_total_scatter_and_needs_no_true_labels():
    model, loader = planted_net(noise=1.0), planted_loader()
    generator = torch.Generator().manual_seed(3)
    shuffled = [(x, y[torch.randperm(len(y), generator=generator)]) for x, y in loader]
    for weight, same in [(0.5, True), (1.0, False), (0.0, False)]:
        a, b = (
            CATROImportance(class_weight=weight).collect(model, X, data).curves()["0"] for data in (loader, shuffled)
        )
        assert np.allclose(a.loss, b.loss, rtol=1e-4) == same


def test_duplicates_are_dispensable_together_they_are_not():
    model = planted_net(noise=0.5)
    with torch.no_grad():  # channels 0 and 1 are the same to the consumer, with opposite signs: they cancel
        model[0].weight[1], model[2].weight[:, 1] = model[0].weight[0], -model[2].weight[:, 0]
    importance = CATROImportance(positions=None).collect(model, X, planted_loader())
    curve = importance.curves()["0"]
    first = curve.order.tolist().index(0), curve.order.tolist().index(1)
    assert abs(first[0] - first[1]) == 1  # the second goes at once: it costs less than nothing
    assert curve.loss[8 - max(first) - 1] < curve.loss[8 - max(first)]


# --- constant channels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", SPACES)
def test_constant_channels_go_first_the_smallest_weights_ahead(space):
    model = dead(planted_net(noise=1.0), [1, 4, 6])
    with torch.no_grad():
        for channel, norm in ((1, 3.0), (4, 1.0), (6, 2.0)):
            model[0].weight[channel] *= norm / model[0].weight[channel].abs().sum()
    importance = CATROImportance(space=space).collect(model, X, planted_loader())
    curve = importance.curves()["0"]
    assert curve.order[:3].tolist() == [4, 6, 1] and sorted(curve.constant.tolist()) == [1, 4, 6]
    assert importance.constant_units == {"0": [1, 4, 6]}
    np.testing.assert_allclose(curve.loss[5:], 0.0, atol=1e-12)
    assert curve.loss[3] > 1e-9  # with ratio="min" the gain of the worst channel left is 0, too


@pytest.mark.parametrize("space", SPACES)
def test_channels_with_a_constant_value_are_constant(space):
    model = planted_net(noise=1.0)
    with torch.no_grad():
        model[0].weight[[0, 3]] = 0.0  # the bias is left: 0.5 everywhere
    importance = CATROImportance(space=space).collect(model, X, planted_loader())
    assert importance.constant_units == {"0": [0, 3]}
    assert set(importance.curves()["0"].order[:2].tolist()) == {0, 3}


@pytest.mark.parametrize("class_weight", [0.0, 1.0])
def test_channels_without_class_information_are_not_constant(class_weight):
    model = planted_net(noise=1.0)
    importance = CATROImportance(class_weight=class_weight).collect(model, X, planted_loader())
    assert importance.constant_units == {}


@pytest.mark.parametrize("space", SPACES)
def test_constant_groups_are_no_error_and_are_reported(space):
    model, x = make_network("concat")
    with torch.no_grad():
        model.left[1].weight.zero_()
        model.left[1].bias.fill_(-1.0)  # nothing passes the ReLU
    pruner = CATROPruner(model, x, class_loader(), budget=Budget(macs=0.6), space=space)
    plan = pruner.plan()
    assert plan.constant["left.0"] == list(range(12)) and set(plan.constant) == {"left.0"}
    kept = {n: w / pruner.initial_widths[n] for n, w in plan.widths.items()}
    assert min(kept, key=kept.__getitem__) == "left.0"  # only what nobody else had room for
    loss = pruner.importance.curves()["left.0"].loss
    assert not loss.any()
    report = pruner.step()
    assert report.constant == {"left.0": 12}
    assert "constant on the data: 12 in left.0" in str(report)


@pytest.mark.parametrize("space", SPACES)
def test_a_network_that_says_nothing_can_be_pruned(space):
    model = dead(planted_net(), list(range(8)))
    pruner = CATROPruner(model, X, planted_loader(), budget=Budget(macs=0.5), space=space)
    report = pruner.step()
    assert report.constant == {"0": 8, "2": 6}
    assert count_ops(model, X)[0] == report.cost.macs <= report.dense.macs // 2


# --- statistics -------------------------------------------------------------------------------------------------------


def seen_by(model, loader, layer):
    seen = []
    handle = model.get_submodule(layer).register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with torch.no_grad():
        for x, _ in loader:
            model(x)
    handle.remove()
    return torch.cat(seen), torch.cat([y for _, y in loader])


@pytest.mark.parametrize("pool", [True, False])
@pytest.mark.parametrize(
    ("topology", "group", "consumer"),
    [
        ("plain", "0.0", "1.0"),
        ("grouped", "1.body.0.0", "1.body.1.0"),
        ("flatten", "1.0", "3"),
        ("concat", "right.0", "tail.0.0"),
        ("transformer_mlp", "blocks.0.mlp.1", "blocks.0.mlp.3"),
    ],
)
def test_channel_space_is_the_scatter_at_the_first_consumer(topology, group, consumer, pool):
    model, x = make_network(topology)
    loader = [(a.double(), y) for a, y in class_loader(n=32, shape=x.shape[1:])]
    importance = CATROImportance(space="channel", pool=pool).collect(model.double(), x.double(), loader)
    inputs, labels = seen_by(model, loader, consumer)
    if isinstance(model.get_submodule(consumer), nn.Linear):
        maps = inputs.unsqueeze(2) if inputs.dim() == 2 else inputs.transpose(1, 2)
    else:
        maps = inputs.flatten(2)
    b, w = ClassScatter().update(maps.mean(2, keepdim=True) if pool else maps, labels).scatter()
    g = importance.groups[group]
    member = g.member(consumer, "in")
    b, w = (np.array([v[member.positions([u])].sum() for u in range(g.n_units)]) for v in (b.numpy(), w.numpy()))
    curve = importance.curves()[group]
    for width in range(1, g.n_units):
        kept = sorted(set(range(g.n_units)) - set(curve.removed(width)))
        assert kept == select(b, w, width).chosen.tolist()  # the best set of every width
    value = b - (b / w).min() * w
    assert curve.order.tolist() == np.argsort(value).tolist()
    gains = np.concatenate([[0.0], np.cumsum(np.sort(value)[::-1])])
    np.testing.assert_allclose(curve.loss, 1 - gains / gains[-1], atol=1e-9)


def test_pruner_takes_the_best_set_of_the_width():
    model, x = make_network("residual")
    pruner = CATROPruner(model, x, class_loader(), budget=Budget(macs=0.4), space="channel")
    plan, curves = pruner.plan(), pruner.importance.curves()
    for g in pruner.groups:
        if 0 < plan.widths[g.name] < g.width:
            assert set(plan.removed[g.name]) == set(range(g.n_units)) - set(curves[g.name].kept[plan.widths[g.name]])


@pytest.mark.parametrize(
    "options", [{"space": "channel"}, {"positions": None}, {"positions": None, "class_weight": 1.0}]
)
def test_subtask_is_the_statistic_of_its_samples(options):
    model, x = make_network("residual")
    model, x = model.double(), x.double()
    loader = [(a.double(), y) for a, y in class_loader(n=64)]
    mine = [(a[keep], y[keep]) for a, y in loader for keep in [torch.isin(y, torch.tensor([1, 3]))]]
    subtask = CATROImportance(classes=[3, 1], **options).collect(model, x, loader)
    filtered = CATROImportance(**options).collect(model, x, mine)
    assert subtask.observed.samples == filtered.observed.samples == 32
    assert subtask.observed.class_counts.tolist() == [0, 16, 0, 16]
    everything = CATROImportance(**options).collect(model, x, loader)
    for name, curve in subtask.curves().items():
        np.testing.assert_allclose(curve.loss, filtered.curves()[name].loss, rtol=1e-7, atol=1e-9)
        assert not np.allclose(curve.loss, everything.curves()[name].loss, rtol=1e-3)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([0, 9], "9"),
        ([0], "two"),
        ([], "classes="),
        ([1, 1], "twice"),
        ([-1, 0], "non-negative"),
        ([True, 2], "integer"),
    ],
)
def test_subtasks_that_cannot_be(space, classes, message):
    model, x = make_network("plain")
    with pytest.raises(ValueError, match=message):
        CATROImportance(space=space, classes=classes).collect(model, x, class_loader())


@pytest.mark.parametrize("space", SPACES)
def test_order_of_the_samples_does_not_matter(space):
    model, x = make_network("residual")
    images, labels = (torch.cat(v) for v in zip(*class_loader(n=48), strict=True))
    images, model, x = images.double(), model.double(), x.double()
    order = torch.randperm(48, generator=torch.Generator().manual_seed(2))
    options = {"positions": None} if space == "consumer" else {}
    a = CATROImportance(space=space, **options).collect(model, x, [(images, labels)])
    batches = zip(images[order].split(7), labels[order].split(7), strict=True)
    b = CATROImportance(space=space, **options).collect(model, x, list(batches))
    for name, curve in a.curves().items():
        assert curve.order.tolist() == b.curves()[name].order.tolist()
        np.testing.assert_allclose(curve.loss, b.curves()[name].loss, rtol=1e-7, atol=1e-9)


def test_sampled_positions_and_all():
    model, x = make_network("plain")
    loader = class_loader(n=64)

    def losses(**options):
        curves = CATROImportance(**options).collect(model, x, loader).curves()
        return np.concatenate([c.loss for c in curves.values()])

    everything = losses(positions=None)
    np.testing.assert_array_equal(losses(positions=10_000), everything)
    sampled = [losses(positions=8, seed=s) for s in (0, 0, 1)]
    assert np.array_equal(sampled[0], sampled[1]) and not np.array_equal(sampled[0], sampled[2])
    few, many = (np.abs(losses(positions=p) - everything).max() for p in (1, 32))
    assert few < 0.2 and many < 0.05
    np.testing.assert_array_equal(losses(positions=None, seed=1), everything)


@pytest.mark.parametrize(
    "options",
    [
        {"space": "weights"},
        {"ratio": "mean"},
        {"class_weight": -0.1},
        {"class_weight": 1.5},
        {"class_weight": float("nan")},
        {"positions": 0},
        {"positions": True},
        {"positions": 2.5},
    ],
)
def test_arguments_out_of_range(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        CATROImportance(**options)
    with pytest.raises(ValueError, match=next(iter(options))):
        CATROPruner(planted_net(), X, planted_loader(), budget=Budget(macs=0.5), **options)
