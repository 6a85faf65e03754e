from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from networks import MLPBlock, class_loader, conv_bn_relu, head, make_network
from tp_importance import Budget, CATROImportance, CATROPruner, count_ops, prunable_groups, slice_classifier
from tp_importance.functional.trace_ratio import ClassScatter, select

SPACES = ["reader", "channel"]
PLANTED = [2, 5]


def planted_net(signal=1.0, noise=0.01, bias=True):
    """Input 0 says which class it is, inputs 1 and 2 are noise; two of eight filters look at input 0.

    `signal` and `noise` are how strongly the second layer reads the two sorts.
    """
    generator = torch.Generator().manual_seed(0)
    first, second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1)
    with torch.no_grad():
        first.weight.zero_()
        first.weight[:, 1:] = torch.randn(8, 2, 1, 1, generator=generator)
        first.weight[PLANTED] = torch.tensor([[1.0, 0.0, 0.0], [0.9, 0.0, 0.0]]).view(2, 3, 1, 1)
        first.bias.fill_(0.5)
        second.weight.copy_(torch.randn(6, 8, 1, 1, generator=generator) * noise)
        second.weight[:, PLANTED] *= signal / noise
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), head(6)).eval()


def planted_loader(n=120, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    x = torch.randn(n, 3, 6, 6, generator=generator)
    x[:, 0] = 0.1 * x[:, 0] + y.view(-1, 1, 1)
    return list(zip(x.split(30), y.split(30), strict=True))


X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(9))


def order_of(model, loader=None, name="0", x=X, **options):
    importance = CATROImportance(**options).collect(model, x, planted_loader() if loader is None else loader)
    return importance.curves()[name].order.tolist()


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
    with torch.no_grad():  # channels 0 and 1 are the same to the reader, with opposite signs: they cancel
        model[0].weight[1], model[2].weight[:, 1] = model[0].weight[0], -model[2].weight[:, 0]
    importance = CATROImportance(positions=None).collect(model, X, planted_loader())
    curve = importance.curves()["0"]
    first = curve.order.tolist().index(0), curve.order.tolist().index(1)
    assert abs(first[0] - first[1]) == 1  # the second goes at once: it costs less than nothing
    assert curve.loss[8 - max(first) - 1] < curve.loss[8 - max(first)]


# --- constant channels ------------------------------------------------------------------------------------------------


def dead(model, channels):
    """With channels that are zero behind the ReLU whatever comes in; their weights stay."""
    with torch.no_grad():
        model[0].bias[channels] = -1e6
    return model


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
    ("topology", "group", "reader"),
    [
        ("plain", "0.0", "1.0"),
        ("grouped", "1.body.0.0", "1.body.1.0"),
        ("flatten", "1.0", "3"),
        ("concat", "right.0", "tail.0.0"),
        ("transformer_mlp", "blocks.0.mlp.1", "blocks.0.mlp.3"),
    ],
)
def test_channel_space_is_the_scatter_at_the_first_reader(topology, group, reader, pool):
    model, x = make_network(topology)
    loader = [(a.double(), y) for a, y in class_loader(n=32, shape=x.shape[1:])]
    importance = CATROImportance(space="channel", pool=pool).collect(model.double(), x.double(), loader)
    inputs, labels = seen_by(model, loader, reader)
    if isinstance(model.get_submodule(reader), nn.Linear):
        maps = inputs.unsqueeze(2) if inputs.dim() == 2 else inputs.transpose(1, 2)
    else:
        maps = inputs.flatten(2)
    b, w = ClassScatter().update(maps.mean(2, keepdim=True) if pool else maps, labels).scatter()
    g = importance.groups[group]
    member = g.member(reader, "in")
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
    options = {"positions": None} if space == "reader" else {}
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


# --- loaders and batches ----------------------------------------------------------------------------------------------


class NoLength:
    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = conv_bn_relu(3, 8), conv_bn_relu(3, 12), head(20)

    def forward(self, left, right):
        return self.head(torch.cat([self.a(left), self.b(right)], 1))


@dataclass
class Record:
    images: Tensor
    target: list[int]


def expected(loader):
    model, x = make_network("plain")
    return CATROImportance().collect(model, x, loader).curves()


@pytest.mark.parametrize(
    "form",
    [
        lambda batches: NoLength(batches),
        lambda batches: (b for b in batches),
        lambda batches: [list(b) for b in batches],
        lambda batches: [{"input": x, "labels": y} for x, y in batches],
        lambda batches: [{"input": x, "label": y.int()} for x, y in batches],
        lambda batches: [({"input": x}, y) for x, y in batches],
        lambda batches: [(x.double(), y.to(torch.uint8), "path") for x, y in batches],
        lambda batches: torch.utils.data.DataLoader(
            [(x, int(y)) for b in batches for x, y in zip(*b, strict=True)], 16
        ),
    ],
    ids=["no len", "generator", "lists", "dict", "label", "pair with dict", "other dtypes", "DataLoader"],
)
def test_loaders(form):
    model, x = make_network("plain")
    batches = class_loader(n=32)
    for name, curve in CATROImportance().collect(model, x, form(batches)).curves().items():
        np.testing.assert_array_equal(curve.loss, expected(batches)[name].loss)


def test_a_generator_serves_one_step_only():
    model, x = make_network("plain")
    pruner = CATROPruner(model, x, (b for b in class_loader(n=32)), budget=Budget(macs=0.7))
    pruner.plan()
    pruner.step()
    widths = pruner.groups.widths
    with pytest.raises(ValueError, match="generator"):
        pruner.step(Budget(macs=0.4))
    assert pruner.groups.widths == widths


@pytest.mark.parametrize("batch", [lambda x, y: x, lambda x, y: {"input": x}, lambda x, y: (x, [1, 2])])
def test_batches_without_labels(batch):
    model, x = make_network("plain")
    with pytest.raises(ValueError, match="label_fn"):
        CATROImportance().collect(model, x, [batch(x, y) for x, y in class_loader(n=32)])


def test_custom_batches():
    model, x = make_network("plain")
    batches = class_loader(n=32)
    records = [Record(x, y.tolist()) for x, y in batches]

    def forward_fn(net, batch):
        return net(batch.images if isinstance(batch, Record) else batch)

    options = {"forward_fn": forward_fn, "label_fn": lambda batch: batch.target}
    importance = CATROImportance().collect(model, x, records, **options)
    for name, curve in importance.curves().items():
        np.testing.assert_array_equal(curve.loss, expected(batches)[name].loss)
    report = CATROPruner(model, x, records, budget=Budget(macs=0.5), **options).step(recalibrate=True)
    assert report.cost.macs == count_ops(model, x)[0]
    with pytest.raises(TypeError, match="Record"):
        CATROImportance().collect(make_network("plain")[0], x, records)


def test_dictionaries_with_names_of_their_own():
    model, x = make_network("plain")
    loader = [{"image": x, "digit": y} for x, y in class_loader(n=32)]
    report = CATROPruner(
        model,
        {"image": x},
        loader,
        budget=Budget(macs=0.5),
        forward_fn=lambda net, batch: net(batch["image"]),
        label_fn=lambda batch: batch["digit"],
    ).step()
    assert report.cost.macs == count_ops(model, x)[0] <= 0.5 * report.dense.macs


def test_several_inputs():
    torch.manual_seed(0)
    model, x = TwoInputs().eval(), torch.randn(2, 3, 16, 16)
    loader = [((a, a + 1), y) for a, y in class_loader(n=32)]
    report = CATROPruner(model, (x, x), loader, budget=Budget(macs=0.5)).step()
    assert report.cost.macs == count_ops(model, (x, x))[0]
    model = TwoInputs().eval()
    named = [({"left": a, "right": a + 1}, y) for a, y in class_loader(n=32)]
    CATROPruner(model, {"left": x, "right": x}, named, budget=Budget(macs=0.5)).step()
    assert model(x, x).shape == (2, 4)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(space, dtype):
    model, x = make_network("residual")
    reference = CATROImportance(space=space).collect(model, x, class_loader()).curves()
    half, x_half = model.to(dtype), x.to(dtype)
    importance = CATROImportance(space=space).collect(half, x_half, class_loader())
    if dtype == torch.float16:
        for name, curve in importance.curves().items():
            np.testing.assert_allclose(curve.loss, reference[name].loss, atol=0.02)
    report = CATROPruner(half, x_half, class_loader(), budget=Budget(macs=0.5), space=space).step()
    assert {p.dtype for p in half.parameters()} == {dtype} and half(x_half).dtype == dtype
    assert report.cost.macs == count_ops(half, x_half)[0]


def test_large_activations_do_not_drown_the_differences():
    """A mean of 1e4 in front of a layer that reads it in float32."""
    model = planted_net(noise=1.0)
    plain = CATROImportance(positions=None).collect(model, X, planted_loader()).curves()["0"]
    with torch.no_grad():
        model[0].bias += 1e4  # past the ReLU, unlike the rest
    shifted = CATROImportance(positions=None).collect(model, X, planted_loader()).curves()["0"]
    double = CATROImportance(positions=None).collect(
        model.double(), X.double(), [(x.double(), y) for x, y in planted_loader()]
    )
    np.testing.assert_allclose(shifted.loss, double.curves()["0"].loss, rtol=1e-2)
    assert np.isfinite(plain.loss).all()


@pytest.mark.parametrize("space", SPACES)
def test_batches_of_any_size(space):
    model, x = make_network("plain")
    batches = class_loader(n=33)
    images, labels = batches[0]
    uneven = [(images[:0], labels[:0]), *batches, (images[:0], labels[:0])]
    a, b = (CATROImportance(space=space, positions=None).collect(model, x, data) for data in (uneven, batches))
    assert a.observed.samples == b.observed.samples == 33
    for name, curve in a.curves().items():
        np.testing.assert_array_equal(curve.loss, b.curves()[name].loss)


def test_batches_without_a_chosen_class():
    model, x = make_network("plain")
    images, labels = (torch.cat(v) for v in zip(*class_loader(n=32), strict=True))
    by_class = [(images[labels == k], labels[labels == k]) for k in range(4)]
    for options in ({"space": "channel"}, {"positions": None}):
        a, b = (
            CATROImportance(classes=[1, 3], **options).collect(model, x, data).curves()["1.0"]
            for data in (by_class, [(images, labels)])
        )
        np.testing.assert_allclose(a.loss, b.loss, rtol=1e-4, atol=1e-6)


class Caches(nn.Module):
    """Keeps a tensor from its first forward pass, as position encodings and anchors do."""

    def __init__(self):
        super().__init__()
        self.a, self.head, self.grid = conv_bn_relu(3, 8), head(8), None

    def forward(self, x):
        x = self.a(x)
        if self.grid is None or self.grid.shape != x.shape:
            self.grid = x.new_ones(x.shape)
        return self.head(x * self.grid)


def test_networks_that_cache_can_be_trained_afterwards():
    torch.manual_seed(0)
    model, x = Caches(), torch.randn(16, 3, 16, 16)
    CATROImportance().collect(model, x, class_loader(n=32))
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_total_scatter_never_gains_by_removal():
    for name in ("residual", "shared_input", "flatten"):
        model, x = make_network(name)
        for curve in CATROImportance().collect(model, x, class_loader(n=32)).curves().values():
            assert curve.loss[-1] == 0 and curve.loss.min() >= -1e-9


# --- the last step of a subtask ---------------------------------------------------------------------------------------


def test_subtask_from_end_to_end():
    model, x = make_network("residual")
    pruner = CATROPruner(model, x, class_loader(), budget=Budget(macs=0.5), classes=[3, 0], class_weight=0.8)
    pruner.step()
    logits = model(x)
    slice_classifier(model, [3, 0])
    torch.testing.assert_close(model(x), logits[:, [3, 0]])
    assert model[3][2].out_features == 2


@pytest.mark.parametrize("bias", [True, False])
def test_slice_classifier(bias):
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 4, bias=bias))
    model[2].weight.requires_grad_(False)
    x = torch.randn(3, 5)
    logits = model(x)
    assert slice_classifier(model, (2, 1, 3)) is model
    torch.testing.assert_close(model(x), logits[:, [2, 1, 3]])
    assert not model[2].weight.requires_grad and (not bias or model[2].bias.requires_grad)
    slice_classifier(model, [6, 0], layer=model[0])
    assert model[0].out_features == 2


@pytest.mark.parametrize("classes", [[], [0, 0], [4], [-1], [0, 1, 2, 3, 4]])
def test_slice_classifier_refuses(classes):
    model = nn.Sequential(nn.Linear(5, 4))
    with pytest.raises(ValueError, match=r"0\.\.3"):
        slice_classifier(model, classes)
    assert model[0].out_features == 4


def test_slice_classifier_needs_a_linear_layer():
    with pytest.raises(ValueError, match="no linear layer"):
        slice_classifier(nn.Sequential(nn.Conv2d(3, 3, 1)), [0])


# --- tokens -----------------------------------------------------------------------------------------------------------


def test_a_layer_that_runs_twice_counts_both_runs():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.head = MLPBlock(12, 16), nn.Linear(12, 4)

        def forward(self, x):
            return self.head(self.block(self.block(x)).mean(1))

    torch.manual_seed(0)
    model, x = Twice().eval(), torch.randn(2, 5, 12)
    loader = class_loader(n=32, shape=(5, 12))
    groups = prunable_groups(model, x)
    assert groups.names == ["block.mlp.1"]
    report = CATROPruner(model, x, loader, budget=Budget(macs=0.6)).step()
    assert report.cost.macs == count_ops(model, x)[0] <= 0.6 * report.dense.macs
