"""Recovery by distillation on the loader's samples: gains, never harms, and leaves no trace but new weights."""

import copy

import pytest
import torch
from torch import nn

from helpers.states import same_state, state
from tp_importance import Budget, Recovery, prune, recover
from tp_importance.recovery.augment import shifted_and_flipped
from tp_importance.recovery.features import common_features, kept_channels

HALF = Budget(macs=0.5)
QUICK = Recovery(epochs=60, lr=5e-3, augment=None, autocast=False)


class Net(nn.Module):
    """Two residual blocks."""

    def __init__(self, outputs=lambda logits, y: logits):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3, padding=1))
            for _ in range(2)
        )
        self.drop, self.head, self.outputs = nn.Dropout(0.5), nn.Linear(8, 5), outputs

    def forward(self, x):
        y = self.stem(x)
        for block in self.blocks:
            y = (y + block(y)).relu()
        return self.outputs(self.head(self.drop(y.mean((2, 3)))), y)


def images(n=128, size=8, seed=0):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def pruned(outputs=lambda logits, y: logits, seed=0, **options):
    torch.manual_seed(seed)
    dense = Net(outputs).eval()
    model = copy.deepcopy(dense)
    options = {"method": "l1", "allocator": "uniform", "refit": "batchnorm"} | options
    prune(model, images(2), list(images().split(32)), budget=HALF, **options)
    return dense, model


@torch.no_grad()
def error(model, dense, x):
    return float((model(x) - dense(x)).square().mean())


def test_it_gains_on_other_samples_and_the_seed_decides():
    dense, model = pruned()
    other, before = images(64, seed=1), None
    twin = copy.deepcopy(model)
    before = error(model, dense, other)
    report = recover(model, dense, list(images().split(32)), QUICK)
    again = recover(twin, dense, list(images().split(32)), QUICK)
    assert report.after < 0.9 * report.before and error(model, dense, other) < 0.8 * before
    assert report.after == again.after and same_state(model, state(twin))
    assert report.samples == 128 and report.epochs == 60 and not report.stopped
    assert "distillation loss" in str(report)


@pytest.mark.parametrize(
    "outputs",
    [
        lambda z, y: {"logits": z, "last": y},
        lambda z, y: (y, [z, y.mean(1)]),
        lambda z, y: y,
    ],
)
def test_outputs_of_any_form(outputs):
    dense, model = pruned(outputs)
    report = recover(model, dense, list(images().split(32)), QUICK)
    assert report.after < report.before


def test_nothing_gained_nothing_changed(caplog):
    dense, model = pruned()
    before = state(model)
    report = recover(model, dense, list(images().split(32)), Recovery(epochs=1, lr=1e3, autocast=False))
    assert report.after == report.before and same_state(model, before)
    assert "nothing gained" in str(report)


def test_modes_flags_gradients_and_frozen_parameters_stay():
    dense, model = pruned()
    model.train()
    model.drop.eval()
    model.head.requires_grad_(False)
    weight = model.stem[0].weight
    weight.grad = torch.ones_like(weight)
    head = model.head.weight.clone()
    modes = [m.training for m in model.modules()]
    recover(model, dense, list(images().split(32)), QUICK)
    assert modes == [m.training for m in model.modules()] and torch.equal(model.head.weight, head)
    assert torch.equal(weight.grad, torch.ones_like(weight)) and model.blocks[0][0].weight.grad is None
    assert [p.requires_grad for p in model.head.parameters()] == [False, False]
    assert not any(len(m._forward_hooks) for m in model.modules())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_after_an_exception_all_is_as_before(error):
    dense, model = pruned()
    before, calls = state(model), []

    def augment(batch, generator):
        calls.append(1)
        if len(calls) == 12:
            raise error("enough")
        return batch

    with pytest.raises(error, match="enough"):
        recover(model, dense, list(images().split(32)), Recovery(epochs=20, augment=augment, autocast=False))
    assert same_state(model, before) and not any(len(m._forward_hooks) for m in model.modules())


def test_prune_and_recover_is_one_step(monkeypatch):
    torch.manual_seed(0)
    model = Net().eval()
    twin = copy.deepcopy(model)
    loader = list(images().split(32))
    result = prune(model, images(2), loader, budget=HALF, method="l1", refit="batchnorm", recover=QUICK)
    assert result.recovery.after < result.recovery.before and "recovered:" in str(result)
    assert prune(copy.deepcopy(twin), images(2), loader, budget=HALF).recovery is None
    before = state(twin)

    def broken(batch, generator):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        prune(twin, images(2), loader, budget=HALF, recover=Recovery(augment=broken, autocast=False))
    assert same_state(twin, before)
    with pytest.raises(ValueError, match="recover= needs images"):
        prune(twin, images(2), budget=HALF, method="l1", refit=None, recover=True)


def test_time_limit():
    dense, model = pruned()
    report = recover(model, dense, list(images().split(32)), Recovery(epochs=400, minutes=0.02, autocast=False))
    assert report.stopped == "stopped after 0.02 minutes" and report.epochs < 400 and report.after <= report.before


def test_few_samples_and_batches_of_one():
    dense, model = pruned()
    report = recover(model, dense, list(images(20).split(1)), Recovery(epochs=20, batch_size=1, autocast=False))
    assert report.after <= report.before and report.samples == 20


def test_few_samples_that_a_batch_norm_could_not_normalise_by():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)).eval()
    model = copy.deepcopy(dense)
    with torch.no_grad():
        model[0].weight[:5] = 0
    for samples in (1, 4):  # of one, training mode would refuse
        report = recover(copy.deepcopy(model), dense, [torch.randn(samples, 3)], QUICK)
        assert report.samples == samples and not report.stopped
    assert report.after < report.before


def test_batches_that_are_not_finite_end_it_with_the_best_state():
    dense, model = pruned()
    calls = []

    def augment(batch, generator):
        calls.append(1)
        return batch * float("nan") if len(calls) == 30 else batch

    report = recover(model, dense, list(images().split(32)), Recovery(epochs=20, augment=augment, autocast=False))
    assert "not finite" in report.stopped and report.after <= report.before
    assert all(torch.isfinite(t).all() for t in model.state_dict().values())
    loader = [images() * float("nan")]
    with pytest.raises(ValueError, match="distillation loss is nan before the first step"):
        recover(model, dense, loader, QUICK)


def test_bad_input():
    dense, model = pruned()
    loader = list(images().split(32))
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module"):
        recover(model, dense.forward, loader)
    with pytest.raises(ValueError, match="are the same network"):
        recover(model, model, loader)
    with pytest.raises(ValueError, match="gave no batch"):
        recover(model, dense, [], QUICK)
    with pytest.raises(TypeError, match=r"compiled by torch\.compile"):
        recover(torch.compile(model), dense, loader)
    other = copy.deepcopy(dense)
    other.head = nn.Linear(8, 7)
    with pytest.raises(ValueError, match=r"an output of shape \(8, 5\), the dense one \(8, 7\)|shape"):
        recover(model, other, loader, QUICK)
    with pytest.raises(ValueError, match=r"gives 1 tensor\(s\), the dense one 2"):
        recover(model, Net(lambda logits, y: (logits, y)), loader, QUICK)
    with pytest.raises(RuntimeError) as caught:
        recover(model, nn.Linear(3, 5), loader, QUICK)
    assert "raised by the dense network, a Linear" in caught.value.__notes__[-1]
    with pytest.raises(ValueError, match="all parameters are frozen"):
        recover(copy.deepcopy(model).requires_grad_(False), dense, loader)
    with pytest.raises(TypeError, match="recovers nothing"):
        recover(model, dense, loader, False)


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": 0},
        {"minutes": -1},
        {"lr": 0.0},
        {"batch_size": True},
        {"batch_size": "auto"},
        {"autocast": "yes"},
        {"seed": "0"},
        {"held_out": "10 %"},
        {"temperature": float("inf")},
        {"feature_weight": -1.0},
        {"held_out": 1.0},
        {"augment": 3},
    ],
)
def test_bad_settings(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"^{name}="):
        Recovery(**options)


def test_settings_of():
    assert Recovery.of(2.5) == Recovery(minutes=2.5) and Recovery.of(None) is None is Recovery.of(False)
    with pytest.raises(TypeError, match="recover='yes'"):
        Recovery.of("yes")


def test_features_are_blocks_of_the_kept_channels():
    dense, model = pruned()
    with torch.no_grad():
        found = common_features(dense, model, lambda m: m(images(4)))
    assert set(found) <= {"stem", "blocks.0", "blocks.1"} and "blocks.1" in found
    narrow, wide = model.stem[0].out_channels, dense.stem[0].out_channels
    assert narrow < wide and all(len(left) == narrow for left in found.values())


def test_kept_channels_of_tokens_and_images():
    x = torch.randn(4, 7, 6)
    assert kept_channels(x[:, :, [1, 4]], x).tolist() == [1, 4]
    assert kept_channels(torch.randn(4, 7, 2), x) is None and kept_channels(x, x[:, :, :3]) is None


def test_augmentation_moves_images_only_and_whole_samples():
    x = torch.arange(2 * 3 * 16 * 16.0).view(2, 3, 16, 16)
    (moved, y), ids = shifted_and_flipped(((x, 3), torch.arange(2)), torch.Generator().manual_seed(1))
    assert moved.shape == x.shape and y == 3 and ids.tolist() == [0, 1]
    same = shifted_and_flipped((x, x + 1), torch.Generator().manual_seed(1))
    torch.testing.assert_close(same[0] + 1, same[1])
    assert set(moved[0].flatten().tolist()) <= set(x[0].flatten().tolist())
    tokens = torch.randn(2, 5)
    assert shifted_and_flipped(tokens, torch.Generator()) is tokens


@pytest.mark.parametrize("views", [True, False])
def test_images_go_in_the_faster_format_where_the_network_takes_it(views):
    class Viewing(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head, self.formats = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8 * 64, 5), []

        def forward(self, x):
            self.formats.append(x.is_contiguous(memory_format=torch.channels_last))
            x = self.conv(x).relu()
            return self.head(x.view(len(x), -1) if views else x.flatten(1))

    torch.manual_seed(0)
    dense = Viewing()
    model = copy.deepcopy(dense)
    with torch.no_grad():
        model.conv.weight[:4] = 0
    strides = model.conv.weight.stride()
    report = recover(model, dense, list(images().split(32)), QUICK)
    assert report.after < 0.9 * report.before and model.conv.weight.stride() == strides
    assert True in model.formats and model.formats[-1] is not views


def test_statistics_that_are_not_those_of_the_samples_stay():
    """As in a network that was never trained: by the batch its features would be ten times as large."""
    dense, model = pruned()
    for network in (dense, model):
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.fill_(100.0)
    before = [m.running_var.clone() for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    report = recover(model, dense, list(images().split(32)), QUICK)
    after = [m.running_var for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert report.after < report.before and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
