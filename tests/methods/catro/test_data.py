"""CATRO on data of all forms, and subtasks."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from helpers.catro_cases import SPACES, X, planted_loader, planted_net
from helpers.networks import TwoInputs
from tp_importance import Budget, CATROImportance, CATROPruner, count_ops, prunable_groups, slice_classifier
from tp_importance.testing import class_loader, make_network
from tp_importance.testing.networks import MLPBlock, conv_bn_relu, head

# --- loaders and batches ----------------------------------------------------------------------------------------------


class NoLength:
    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


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
    report = CATROPruner(model, x, records, budget=Budget(macs=0.5), **options).step(refit="batchnorm")
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
