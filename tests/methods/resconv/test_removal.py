"""Removing layers: exact at s = 0, whatever lies around them."""

import copy
import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from helpers.resconv_cases import (
    CASES,
    HEAD,
    ONE,
    PREACT,
    TWO,
    Basic,
    R,
    Wired,
    X,
    cbr,
    check,
    conv,
    masked,
    ready,
    resnet,
    vgg,
)
from tp_importance import count_ops
from tp_importance.methods.resconv import ResConv2d, Scale, convert_to_resconv, remove_layers, resconv_layers
from tp_importance.methods.resconv.costs import LayerCosts
from tp_importance.testing import Snapshot, make_network
from tp_importance.testing.networks import conv_bn_relu, head


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("fixed", [True, False], ids=["fixed", "free"])
def test_removal_is_exact(name, fixed):
    fn, modules, names, kept = CASES[name]
    torch.manual_seed(0)
    model = ready(Wired(fn, modules, fixed))
    names = list(resconv_layers(model)) if names == "*" else [names]
    check(model, names, kept=kept if fixed else None)


@pytest.mark.parametrize("build", [resnet, vgg])
def test_every_subset(build):
    """A running network, equal to the masked one, of the cost that was predicted."""
    whole = ready(build())
    layers, costs = list(resconv_layers(whole)), LayerCosts.of(whole, X)
    assert len(layers) == {resnet: 6, vgg: 4}[build]
    assert costs.dense.as_dict() == dict(zip(("macs", "params"), count_ops(build().double(), X), strict=True))
    for n in range(1, len(layers) + 1):
        for names in itertools.combinations(layers, n):
            model, report = check(copy.deepcopy(whole), list(names), kept=0)
            assert not resconv_layers(model) and count_ops(model, X) == tuple(
                costs.without(list(names)).as_dict().values()
            )
            blocks = [b for b in ("1", "2") if {f"{b}.conv1", f"{b}.conv2"} <= set(names)]
            assert build is vgg or list(report.collapsed) == blocks
            assert all(type(model.get_submodule(b)) is nn.Identity for b in report.collapsed)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["padded_shortcut", "depthwise", "grouped"])
def test_networks_of_the_contract_suite(name, seed):
    model, x = make_network(name, seed)
    model = ready(model, seed=seed)
    names = [n for i, n in enumerate(resconv_layers(model)) if (i + seed) % 2 or len(resconv_layers(model)) == 1]
    check(model, names, x=x.double())


def test_factor_of_a_block():
    model = ready(nn.Sequential(conv_bn_relu(3, 8), Basic(), nn.ReLU6()))
    a = [layer.a.item() for layer in resconv_layers(model).values()]
    model[0][2] = nn.ReLU6()  # neither can the factor go back
    report = check(model, ["1.conv1", "1.conv2"], kept=1)[1]
    assert report.collapsed == pytest.approx({"1": 1 + a[0] * a[1]}) and report.kept_scales == report.collapsed
    assert isinstance(model[1], Scale)


def test_blocks_that_only_look_collapsed():
    """They get or give more than a tensor: an Identity in their place would not do."""

    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv()

        def forward(self, x, times=2):
            return [self.conv(x[0])]

    model = ready(Wired(lambda m, x: m.h(m.b([x], times=3)[0]), {"b": Listed} | HEAD, True))
    report = check(model, ["b.conv"], kept=0)[1]
    assert not report.collapsed and type(model.b) is Listed and type(model.b.conv) is nn.Identity


def test_idle_activations_go_and_others_stay():
    model = ready(nn.Sequential(conv_bn_relu(3, 8), cbr(), cbr(), nn.ReLU(), head(8)))
    check(model, ["1.0"])
    assert type(model[1]) is nn.Identity and type(model[2][2]) is nn.ReLU
    assert type(model[3]) is nn.ReLU  # idle before: the user's


def test_training_goes_on_as_if_masked():
    """Batch norms follow their input: what is folded must not change what they give in train mode."""
    model = ready(Wired(lambda m, x: m.h(R(m.n(m.q(m.p(x))))), PREACT | HEAD, True))
    for names in (["p.conv2"], ["p.conv1", "p.conv2"], ["q.conv2"]):
        twin, removed = masked(model, names), copy.deepcopy(model)
        remove_layers(removed, X, names)
        assert all(not m.training for m in removed.modules())
        torch.testing.assert_close(removed.train()(X), twin.train()(X), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(removed.eval()(X), twin.eval()(X), rtol=1e-4, atol=1e-4)  # statistics moved alike
        removed.train()(X).square().sum().backward()
        assert all(p.grad is not None for n, p in removed.named_parameters() if not n.startswith("h.1"))


class Inplace(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.a, self.b, self.fn = conv(), conv(), fn

    def forward(self, x):
        return self.fn(self, x)


WRITES = {
    "+=": lambda m, x: m.b(F.relu(m.a(x))).add_(x),
    "relu_": lambda m, x: m.b(F.relu_(m.a(x))) + x,
    "both": lambda m, x: F.relu_(m.b(F.relu_(m.a(x))).add_(x)),
    "slice": lambda m, x: (y := m.a(x), y[:, :2].mul_(2), m.b(y) + x)[2],
    "setitem": lambda m, x: (y := m.a(x), y.__setitem__((slice(None), 0), x[:, 1]), m.b(y) * x.sigmoid())[2],
    "dropout": lambda m, x: m.b(x) * F.dropout(m.a(x), 0.5, m.training, True) + x,
    "parallel": lambda m, x: m.a(x).add_(m.b(x)) * x.sigmoid(),
    "view": lambda m, x: m.b(F.relu_(m.a(x).flatten(1)).view(x.shape)) + x,
}


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("names", [["1.a"], ["1.b"], ["1.a", "1.b"]], ids=",".join)
def test_writing_in_place(name, names):
    """A convolution gives a new tensor; without it, its input and what autograd keeps of it must not be written to."""
    for a in ((1, 1), (0.5, 1.5)):  # the identity, and a factor that is folded
        model = ready(nn.Sequential(conv_bn_relu(3, 8), Inplace(WRITES[name]), nn.SiLU(), head(8)), a)
        model = check(model, names)[0]
        for p in model.parameters():
            p.grad = None
        model.train()(X).square().sum().backward()
        model.eval()
        gradient = {n: p.grad for n, p in model.named_parameters()}
        expected, reference = X.clone(), model(X)
        assert all(g is not None for g in gradient.values()) and torch.equal(X, expected)
        torch.testing.assert_close(model(X), reference, rtol=0, atol=0)


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_blocks_of_torchvision_can_be_trained(block):
    """Their one ReLU works in place, and so does their addition."""
    for n in range(1, 4):
        for names in itertools.combinations(("1.conv1", "1.conv2", "1.conv3"), n):
            torch.manual_seed(0)
            inner = block(8, 8) if block is BasicBlock else block(8, 2)
            inner.conv1, inner.bn1 = conv(), nn.BatchNorm2d(8)
            inner.conv2, inner.bn2 = conv(), nn.BatchNorm2d(8)
            if block is Bottleneck:
                inner.conv3, inner.bn3 = conv(), nn.BatchNorm2d(8)
            elif "1.conv3" in names:
                continue
            model = check(ready(nn.Sequential(conv_bn_relu(3, 8), inner, head(8))), list(names), kept=0)[0]
            model.train()(X).square().sum().backward()


@pytest.mark.parametrize("a", [1e-6, 1e6])
def test_extreme_factors(a):
    model = ready(resnet(), (a, a))
    check(model, ["1.conv1", "2.conv2", "3.conv2"])


def test_one_after_the_other_is_all_at_once():
    model = ready(resnet())
    names = list(resconv_layers(model))
    expected = masked(model, names)(X)
    for name in names:
        remove_layers(model, X, [name])
    torch.testing.assert_close(model(X), expected)
    assert not any(isinstance(m, (ResConv2d, Scale)) for m in model.modules())
    assert type(model[1]) is type(model[2]) is nn.Identity


def test_a_scale_that_stayed_can_go_later():
    model = ready(Wired(lambda m, x: m.h(m.b(F.relu6(m.a(x)))), TWO | HEAD, True))
    x = masked(model, ["a.0", "b.0"])(X)
    assert len(remove_layers(model, X, ["a.0"]).kept_scales) == 1
    report = remove_layers(model, X, ["b.0"])
    assert list(report.kept_scales) == ["a"]
    torch.testing.assert_close(model(X), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    model = ready(resnet()).to(dtype)
    names = ["1.conv1", "2.conv1", "2.conv2", "4.conv2"]
    expected = masked(model, names)(X.to(dtype)).detach().float()
    remove_layers(model, X.to(dtype), names)
    assert {p.dtype for p in model.parameters()} == {dtype}
    torch.testing.assert_close(model(X.to(dtype)).float(), expected, rtol=0.1, atol=0.1 * float(expected.abs().max()))


def test_outputs_of_all_kinds():
    model = ready(
        Wired(
            lambda m, x: {"y": (y := m.h(R(m.a(x)))), "sign": y > 0, "n": (y.argmax(1),)},
            ONE | HEAD,
            True,
        )
    )
    remove_layers(model, X, ["a.0"])
    assert not resconv_layers(model)


def test_flags_modes_and_frozen_parameters():
    model = ready(resnet())
    for p in model[4].parameters():
        p.requires_grad_(False)
    model.train()[3].eval()
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    modes = {n: m.training for n, m in model.named_modules()}
    hook = model[5][2].register_forward_hook(lambda *_: None)
    remove_layers(model, X, ["1.conv1", "3.conv2"])
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == frozen
    assert all(m.training == modes[n] for n, m in model.named_modules())
    assert [h for m in model.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)] == [hook.id]


# --- errors: the model is as before -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (["nope"], "'nope' is no module"),
        (["1.bn1"], "'1.bn1' is a Identity"),
        (["1.conv1", "5.2"], "'5.2' is a Linear, not a ResConv2d"),
        ("1.conv1", "'1' is a Basic"),
    ],
)
def test_unknown_names(names, why):
    model = ready(resnet())
    snapshot = Snapshot(model)
    with pytest.raises(ValueError, match=why):
        remove_layers(model, X, names)
    snapshot.check()


@pytest.mark.parametrize("a", [-0.5, float("nan"), float("inf")])
def test_factors_that_cannot_be_folded(a):
    model = ready(resnet())
    model[1].conv1.a.data.fill_(a)
    with pytest.raises(ValueError, match=r"layer 1.conv1 has a=.*finite and >= 0"):
        remove_layers(model, X, ["1.conv2", "1.conv1"])
    assert len(resconv_layers(model)) == 6


def test_untrained_layers_become_the_identity():
    model = ready(resnet(), (0, 0))
    with pytest.warns(UserWarning, match=r"layer 4\.conv2 has a=0"):
        remove_layers(model, X, ["4.conv2"])
    twin = ready(resnet(), (1, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        remove_layers(twin, X, ["4.conv2", "4.conv2"])
    assert type(model[4].conv2) is type(twin[4].conv2) is nn.Identity


@pytest.mark.parametrize("where", ["fold_scales", "_collapse", "outputs_of", "_idle_activations", "require_same"])
def test_nothing_happens_if_anything_fails(where, monkeypatch):
    model = ready(resnet()).train()
    snapshot = Snapshot(model)
    monkeypatch.setattr(f"tp_importance.methods.resconv.removal.{where}", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        remove_layers(model, X, ["1.conv1", "2.conv1", "2.conv2"])
    snapshot.check()


def test_a_fold_that_goes_wrong_is_undone(monkeypatch):
    model = ready(resnet())
    snapshot = Snapshot(model)
    monkeypatch.setattr("tp_importance.methods.resconv.folding._Scales.absorb", lambda *_: None)
    with pytest.raises(RuntimeError, match=r"removing 1\.conv1 changes the output"):
        remove_layers(model, X, ["1.conv1"])
    snapshot.check()


def test_the_stream_keeps_its_scale():
    """A factor on the way into an add goes into the branch: most tensors, the stream, stay as they are."""
    model = convert_to_resconv(resnet().double().eval(), X)
    with torch.no_grad():
        model.get_submodule("4.conv2").s.zero_()
        model.get_submodule("4.conv2").a.fill_(0.01)
    shortcut, inner = (model.get_submodule(n).weight.clone() for n in ("4.shortcut.1", "4.bn1"))
    y = model(X)
    remove_layers(model, X, ["4.conv2"])
    assert torch.allclose(model.get_submodule("4.shortcut.1").weight, shortcut)
    assert torch.allclose(model.get_submodule("4.bn1").weight, 0.01 * inner)
    assert torch.allclose(model(X), y)
