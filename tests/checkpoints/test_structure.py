"""Networks whose layers were fused, replaced, shared or removed, through a file."""

import warnings

import pytest
import torch
from torch import nn

from helpers.checkpoint_cases import Split, assert_same
from tp_importance import Budget
from tp_importance.checkpoints import checkpoint
from tp_importance.checkpoints.checkpoint import load_pruned, save_pruned
from tp_importance.methods.resconv import ResConvPruner, Scale, convert_to_resconv, fuse, remove_layers

# Surgery: what later methods do to a network.


def conv_bn():
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))


def test_fused_and_replaced_layers(path):
    model, x = conv_bn().eval(), torch.randn(1, 3, 8, 8)
    model[0] = torch.nn.utils.fuse_conv_bn_eval(model[0], model[1])
    model[1] = nn.Identity()
    model[2] = nn.Conv2d(4, 4, 3, padding="same", padding_mode="reflect", bias=False)
    model[3] = nn.Identity()
    save_pruned(model, path)
    again = load_pruned(conv_bn, path)
    assert_same(model, again)
    assert torch.equal(model(x), again(x))
    assert not list(again[1].buffers()) and again[0].bias is not None


def test_rebuilt_batch_normalisation_keeps_its_constants(path):
    model = nn.Sequential(
        nn.BatchNorm1d(3, eps=0.5, momentum=None, affine=False), nn.BatchNorm1d(2, eps=0.25, momentum=None)
    )
    save_pruned(model, path)
    again = load_pruned(lambda: nn.Sequential(nn.Identity(), nn.BatchNorm1d(3)), path)
    assert (again[0].eps, again[0].momentum, again[0].weight) == (0.5, None, None)
    assert (again[1].eps, again[1].momentum) == (0.25, None)


def test_container_becomes_identity_and_bias_goes(path):
    def factory():
        return nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), nn.Linear(3, 3))

    model = factory()
    model[0], model[1].bias = nn.Identity(), None
    save_pruned(model, path)
    assert_same(model, load_pruned(factory, path))


@pytest.mark.parametrize("shared", ["file", "factory", "both"])
def test_shared_layers(path, shared):
    def network(share):
        first = nn.Linear(3, 3)
        return nn.Sequential(first, nn.ReLU(), first if share else nn.Linear(3, 3))

    model, x = network(shared != "factory"), torch.randn(2, 3)
    save_pruned(model, path)
    again = load_pruned(lambda: network(shared != "file"), path)
    assert (again[0] is again[2]) is (model[0] is model[2])
    assert torch.equal(model(x), again(x))


# Errors.


def user_block():
    return nn.Sequential(*conv_bn()[:3], Split())


@pytest.mark.parametrize(
    ("saved", "factory", "message"),
    [
        (conv_bn, lambda: conv_bn()[:3], "layer '3'.*in the file but not in the factory's model.*factory that built"),
        (conv_bn, lambda: conv_bn().append(nn.ReLU()), "layer '4'.*of the factory's model is not in the file"),
        (
            conv_bn,
            lambda: nn.ModuleList(conv_bn()),
            "file holds a .*Sequential, the factory builds a .*ModuleList; load with",
        ),
        (user_block, conv_bn, r"layer '3' is a .*Split.*Conv2d"),
    ],
)
def test_wrong_factory(path, saved, factory, message):
    save_pruned(saved(), path)
    with pytest.raises(ValueError, match=message):
        load_pruned(factory, path)


@pytest.mark.parametrize("shared", [True, False])
def test_shared_user_module_on_one_side_only(path, shared):
    def network(share):
        first = Split()
        return nn.ModuleList([first, first if share else Split()])

    save_pruned(network(shared), path)
    with pytest.raises(ValueError, match=r"layer '1' is a .*module '[01]'.*module '[01]'"):
        load_pruned(lambda: network(not shared), path)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()

    def forward(self, x):
        return self.act(x + self.bn(self.conv(x)))


def residuals():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU6(), Residual(), Residual(), nn.ReLU6(), nn.Conv2d(8, 2, 1))


@pytest.mark.parametrize("gone", [[], ["2.conv"], ["2.conv", "3.conv"]], ids=len)
@pytest.mark.parametrize("fused", [True, False])
def test_removed_and_fused_layers(path, gone, fused):
    """Blocks that are gone, factors that stay, convolutions that have gained a bias."""
    x = torch.randn(2, 3, 8, 8)
    model = convert_to_resconv(residuals().eval(), x, a=0.5)
    if gone:
        remove_layers(model, x, gone)
    names = [name for name in ("2.conv", "3.conv") if name not in gone]
    if fused and len(gone) < 2:
        fuse(model)
    scales = {n: m.factor.item() for n, m in model.named_modules() if isinstance(m, Scale)}
    assert bool(scales) == bool(gone)
    plain = fused or len(gone) == 2
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        save_pruned(model, path)
    assert len(said) == (not plain)
    again = load_pruned(residuals if plain else lambda: convert_to_resconv(residuals(), x), path)
    assert_same(model, again)
    assert torch.equal(model(x), again(x))
    assert {n: m.factor.item() for n, m in again.named_modules() if isinstance(m, Scale)} == scales
    if not plain:
        message = str(said[0].message)
        assert said[0].category is UserWarning and said[0].filename == __file__
        assert f"layers of class ResConv2d ({', '.join(names)})" in message
        with pytest.raises(ValueError, match=r"layer '[23]\.conv' is a .*ResConv2d") as caught:
            load_pruned(residuals, path)
        for text in (message, str(caught.value)):
            assert "fuse(model) first" in text and "factory that calls convert_to_resconv on the network" in text
    again.train()(x).sum().backward()


def test_unfused_layers_are_saved_where_warnings_are_errors(path):
    model = convert_to_resconv(residuals().eval(), torch.randn(2, 3, 8, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="ResConv2d"):
            save_pruned(model, path)
    assert path.exists()


def test_step_without_fusing_can_be_loaded(path):
    x = torch.randn(2, 3, 8, 8)
    model = convert_to_resconv(residuals().eval(), x, a=0.5)
    ResConvPruner(model, x, budget=Budget(macs=0.9)).step(fuse=False)
    with pytest.warns(UserWarning, match="ResConv2d"):
        save_pruned(model, path)
    assert torch.equal(load_pruned(lambda: convert_to_resconv(residuals(), x), path)(x), model(x))
    with pytest.raises(ValueError, match="convert_to_resconv"):
        load_pruned(residuals, path)
    fuse(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_pruned(model, path)
    assert torch.equal(load_pruned(residuals, path)(x), model(x))


def test_register_rebuilt(path, monkeypatch):
    class Gain(nn.Module):
        """A layer of the user's, with a float in its constructor."""

        def __init__(self, size: int = 1, gain: float = 1.0, mode: str = "mul"):
            super().__init__()
            self.size, self.gain, self.mode = size, gain, mode
            self.weight = nn.Parameter(torch.ones(size))

        def forward(self, x):
            return x * self.weight * self.gain if self.mode == "mul" else x

    monkeypatch.setattr("tp_importance.checkpoints.checkpoint.REBUILT", dict(checkpoint.REBUILT))
    model = nn.Sequential(nn.Linear(4, 4), Gain(4, 0.5))
    save_pruned(model, path)
    with pytest.raises(ValueError, match=r"layer '1' is a .*Gain"):
        load_pruned(lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU()), path)
    checkpoint.register_rebuilt(Gain)
    checkpoint.register_rebuilt(Gain)
    save_pruned(model, path)
    again = load_pruned(lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU()), path)
    x = torch.randn(3, 4)
    assert again[1].gain == 0.5 and torch.equal(again(x), model(x))
    other = type("Gain", (nn.Module,), {"__module__": Gain.__module__, "__qualname__": Gain.__qualname__})
    with pytest.raises(ValueError, match="registered already"):
        checkpoint.register_rebuilt(other)
