"""Layers that stay are refitted to the removal of others: they make up for it, also in residual streams."""

import copy

import pytest
import torch
from torch import nn

from helpers.states import same_state, state
from tp_importance import Budget, Recovery, Refit, ResConvPruner
from tp_importance.methods.resconv import convert_to_resconv, remove_layers, resconv_layers
from tp_importance.methods.resconv.refit import refit_to_removal
from tp_importance.methods.resconv.report import LayerReport
from tp_importance.refitting.towards import refit_towards


class Residual(nn.Module):
    """Blocks of two convolutions with batch norms, the second added to the stream."""

    def __init__(self, blocks=4, width=8):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "conv1": nn.Conv2d(width, width, 3, padding=1, bias=False),
                    "bn1": nn.BatchNorm2d(width),
                    "conv2": nn.Conv2d(width, width, 3, padding=1, bias=False),
                    "bn2": nn.BatchNorm2d(width),
                }
            )
            for _ in range(blocks)
        )
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        x = self.stem(x).relu()
        for b in self.blocks:
            x = (x + b["bn2"](b["conv2"](b["bn1"](b["conv1"](x)).relu()))).relu()
        return self.head(x.mean((2, 3)))


def images(n=256, seed=0):
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


LOADER, X = list(images().split(32)), images(2)


def residual():
    torch.manual_seed(0)
    model = Residual()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.3, 0.6)
            nn.init.uniform_(m.bias, -0.2, 0.2)
    model.train()
    with torch.no_grad():
        model(images(512, seed=3))
    return model.eval()


@torch.no_grad()
def error(model, dense):
    x = images(128, seed=1)
    return float((model(x) - dense(x)).square().mean() / dense(x).square().mean())


@pytest.mark.parametrize("fuse", [True, False])
def test_the_others_make_up_for_what_is_gone(fuse):
    dense = residual()
    errors, options = {}, {"budget": Budget(macs=0.6), "importance": "output"}
    for refit in ("batchnorm", "sequential"):
        model = copy.deepcopy(dense)
        report = ResConvPruner(model, X, LOADER, **options).step(refit=refit, fuse=fuse)
        errors[refit] = error(model, dense)
    assert report.removed and report.refit.mode == "sequential" and report.refit.rows
    assert all(row.after <= row.before for row in report.refit.rows)
    assert errors["sequential"] < 0.5 * errors["batchnorm"]
    assert bool(resconv_layers(model)) is not fuse
    assert "refitted: " in str(report) and LayerReport.from_dict(report.to_dict()) == report
    older = {key: value for key, value in report.to_dict().items() if key not in ("refit", "recovery")}
    assert LayerReport.from_dict(older).removed == report.removed
    gone = {f"{name}.conv" for name in report.removed}
    assert not gone & {row.name for row in report.refit.rows}


def test_a_sum_makes_up_for_a_dead_branch():
    """With the first block gone as a whole, the second one's last convolution gives what its sum lacks."""
    model = convert_to_resconv(residual(), X)
    dense, apart = copy.deepcopy(model), copy.deepcopy(model)
    factors = {"blocks.0.conv1": 0.5, "blocks.0.conv2": 0.01}
    refit_to_removal(model, X, LOADER, factors, Refit())
    refit_to_removal(apart, X, LOADER, factors, Refit(residual=False))
    for network in (model, apart):
        assert [(m.s.item(), m.a.item()) for m in resconv_layers(network).values()] == [(1.0, 0.0)] * 8
        remove_layers(network, X, factors)
    assert error(model, dense) < 0.7 * error(apart, dense)


def test_trained_factors_stay():
    model = convert_to_resconv(residual(), X)
    with torch.no_grad():
        for i, layer in enumerate(resconv_layers(model).values()):
            layer.s.fill_(0.5 + 0.1 * i)
            layer.a.fill_(0.2)
    dense = copy.deepcopy(model)
    plain, refitted = copy.deepcopy(model), model
    factors = {"blocks.1.conv1": 0.2, "blocks.2.conv1": 0.2}
    report = refit_to_removal(refitted, X, LOADER, factors, Refit())
    assert "blocks.3.conv2.conv" in {row.name for row in report.rows}
    for network in (plain, refitted):
        remove_layers(network, X, factors)
    assert error(refitted, dense) < 0.8 * error(plain, dense)


def test_after_an_exception_the_model_is_as_before():
    model = residual()
    pruner = ResConvPruner(model, X, LOADER, budget=Budget(macs=0.6), importance="output")
    plan, before = pruner.plan(), state(model)
    modules = [type(m) for m in model.modules()]

    class Broken(list):
        def __iter__(self):
            yield from list.__iter__(self)
            raise KeyboardInterrupt

    pruner.loader = Broken(LOADER)
    with pytest.raises(KeyboardInterrupt):
        pruner.apply(plan, refit=True)
    assert same_state(model, before) and [type(m) for m in model.modules()] == modules
    with pytest.raises(ValueError, match="refit='parallel' is for channels"):
        pruner.apply(plan, refit="parallel")
    with pytest.raises(ValueError, match="downstream=False refits only layers that lose inputs"):
        pruner.apply(plan, refit=Refit(downstream=False))


def test_what_cannot_be_refitted_is_said():
    shared = nn.Linear(6, 6)
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), shared, nn.ReLU(), shared, nn.Linear(6, 3))
    dense, x = copy.deepcopy(net), torch.randn(64, 6)
    nn.init.eye_(net[0].weight)
    report = refit_towards(net, dense, x[:2], [x], ["0"], Refit())
    assert "runs several times" in report.rows[0].skipped and report.rows[-1].after < report.rows[-1].before
    assert refit_towards(net, dense, x[:2], [x], ["5"], Refit()).rows == []


@pytest.mark.parametrize("fuse", [True, False])
def test_a_recovery_leaves_factors_and_frozen_layers(fuse):
    model = residual()
    model.blocks[3].requires_grad_(False)
    frozen = copy.deepcopy(model.blocks[3])
    pruner = ResConvPruner(model, X, LOADER, budget=Budget(macs=0.7), importance="output")
    report = pruner.step(fuse=fuse, recover=Recovery(epochs=8, lr=0.02, augment=None, autocast=False))
    assert report.recovery.after < report.recovery.before and "blocks.3.conv2" not in report.removed
    if fuse:
        bn, kernel = frozen["bn2"], model.blocks[3]["conv2"].weight.flatten()
        gain = (bn.weight / (bn.running_var + bn.eps).sqrt()).view(-1, 1, 1, 1)
        expected = (frozen["conv2"].weight * gain).flatten()  # times what removed layers hand on
        assert nn.functional.cosine_similarity(kernel, expected, dim=0) > 1 - 1e-6
    else:
        assert [(m.s.item(), m.a.item()) for m in pruner.layers.values()] == [(1.0, 0.0)] * len(pruner.layers)
        assert all(m.s.requires_grad and m.a.requires_grad for m in pruner.layers.values())
        assert pruner.step(Budget(macs=0.45), refit=True).removed
