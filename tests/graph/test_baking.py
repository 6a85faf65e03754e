"""Computed weights become plain parameters, exactly, or the network stays as it was."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, spectral_norm, weight_norm
from torch.nn.utils import prune as masks

from helpers.group_cases import reasons
from tp_importance import Budget, bake_weights, prunable_groups, prune
from tp_importance.core.copies import copied
from tp_importance.errors import TracingError
from tp_importance.graph.verify import masked_equals_removed, sample_units
from tp_importance.testing import Snapshot

X = torch.randn(2, 3, 17, 17, generator=torch.Generator().manual_seed(5))


def standardised(weight, gain):
    deviation, mean = torch.std_mean(weight, (1, 2, 3), keepdim=True, correction=0)
    return gain * (weight - mean) / (deviation + 1e-5)


class Clamped(nn.Conv2d):
    """Clamps what the example inputs do not reach."""

    def forward(self, x):
        return self._conv_forward(x.clamp(-200, 200), 2 * self.weight, self.bias)


class StdConv2d(nn.Conv2d):
    """Weight standardisation with a gain per filter."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5)

    def forward(self, x):
        return self._conv_forward(x, standardised(self.weight, self.gain), self.bias)


class SameConv2d(StdConv2d):
    """Pads so that the output has ⌈size / stride⌉ pixels: how much depends on the input."""

    def forward(self, x):
        pads = []
        for size, kernel, stride in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            more = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [more // 2, more - more // 2]
        return super().forward(F.pad(x, pads))


class Gated(nn.Conv2d):
    """Its weight depends on its input."""

    def forward(self, x):
        return F.conv2d(x, self.weight * x.mean().sigmoid(), self.bias)


class Scaled(StdConv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Branches(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight.tanh(), self.bias) + F.conv2d(x, self.weight.sin())


class Tanh(nn.Linear):
    """Uses another weight; not through a linear function."""

    def forward(self, x):
        return x @ self.weight.tanh().t() + self.bias


class Cast(nn.Linear):
    """Its own weight, in the precision of its input."""

    def forward(self, x):
        return F.linear(x.double(), self.weight.double(), self.bias.double()).to(x.dtype)


def scrambled(model):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.rand(p.shape))
    return model


def network(conv=StdConv2d, change=None):
    """Three convolutions; `change` is done to the second one, which is of the given class."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        second = conv(8, 12, 3)
        if change is not None:
            change(second)
        model = nn.Sequential(
            *(StdConv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), second, nn.ReLU(), nn.Conv2d(12, 6, 1), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)),
        )
    return scrambled(model).eval()


def close(a, b):
    assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_standardised_convolutions():
    model = network()
    untouched = [model[i] for i in (1, 4, 8)]
    before, state = model(X).detach(), torch.get_rng_state()
    report = bake_weights(model, X)
    assert report.baked == dict.fromkeys(("0", "2"), "the forward of StdConv2d") and not report.left_out
    assert torch.equal(torch.get_rng_state(), state)
    close(model(X), before)
    assert type(model[0]) is type(model[2]) is nn.Conv2d and model[0].stride == (2, 2) and model[0].padding == (1, 1)
    assert all(model[i] is layer for i, layer in zip((1, 4, 8), untouched, strict=True))
    assert not bake_weights(model, X).baked
    assert "baked 2 of 2 layers" in str(report) and "2: the forward of StdConv2d" in str(report)


def test_all_of_it_can_be_pruned_then():
    model = network()
    found = reasons(model, X)
    assert "2 (StdConv2d" in found["0"] and "bake_weights(model, example_inputs) makes its weight a plain" in found["0"]
    assert "bake_weights" not in found["8"]  # the output
    bake_weights(model, X)
    groups = prunable_groups(model, X)
    assert groups.names == ["0", "2", "4"]
    assert masked_equals_removed(groups, X, sample_units(groups, seed=1)) is None
    assert prune(model, X, [X], budget=Budget(macs=0.5), refit=None).report.cost.macs > 0 and model[0].out_channels < 8


CHANGES = {
    "weight_norm": weight_norm,
    "spectral_norm": spectral_norm,
    "new weight_norm": parametrizations.weight_norm,
    "new spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "mask": lambda layer: masks.l1_unstructured(layer, "weight", 0.5),
    "bias": lambda layer: parametrize.register_parametrization(layer, "bias", nn.Tanh()),
    "both": lambda layer: parametrizations.weight_norm(
        parametrize.register_parametrization(layer, "bias", nn.Tanh()), "weight"
    ),
}


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("training", [True, False])
def test_what_torch_computes_weights_by(kind, training):
    model = network(nn.Conv2d, CHANGES[kind]).train(training)
    twin = copied(model).eval()
    report = bake_weights(model, X)
    assert set(report.baked) == {"0", "2"} and report.baked["2"] != "the forward of StdConv2d"
    assert all(m.training is training for m in model.modules())
    close(model.eval()(X), twin(X))
    assert type(model[2]) is nn.Conv2d and set(model[2]._parameters) == {"weight", "bias"} and not model[2]._buffers
    assert not model[2]._forward_pre_hooks and "2" not in reasons(model, X)


LAYERS = {
    "transposed": (nn.ConvTranspose2d(3, 6, 3, stride=2, output_padding=1), (2, 3, 9, 9)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4, padding=1, padding_mode="reflect", bias=False), (2, 4, 9, 9)),
    "dilated, same": (nn.Conv1d(4, 6, 3, dilation=2, padding="same"), (2, 4, 20)),
    "3-D": (nn.Conv3d(2, 4, (1, 3, 3), padding=(0, 1, 1)), (2, 2, 3, 8, 8)),
    "unbatched": (nn.Conv1d(4, 6, 3), (4, 20)),
    "linear": (nn.Linear(5, 3), (2, 7, 5)),
    "double": (nn.Linear(5, 3).double(), (2, 5)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_of_every_kind(kind):
    layer, shape = LAYERS[kind]
    layer = copy.deepcopy(layer)
    x = torch.randn(shape, dtype=layer.weight.dtype)
    model = nn.Sequential(parametrizations.weight_norm(layer)).eval()
    before = model(x).detach()
    assert list(bake_weights(model, x).baked) == ["0"]
    close(model(x), before)
    plain = LAYERS[kind][0]
    assert type(model[0]) is type(plain) and str(model[0]) == str(plain) and model[0].weight.dtype == plain.weight.dtype


REFUSED = {
    "pads by the size of its input": (lambda: network(SameConv2d), "differ"),
    "pads nothing at this size": (lambda: network(lambda a, b, _: SameConv2d(a, b, 3, stride=3)), "smaller"),
    "depends on its input": (lambda: network(Gated), "on other values"),
    "clamps its input": (lambda: network(Clamped), "on larger values"),
    "scales its output": (lambda: network(Scaled), "differ"),
    "several convolutions": (lambda: network(Branches), "calls 2 of them"),
    "has a hook": (lambda: network(change=lambda c: c.register_forward_hook(lambda *_: None)), "it has hooks"),
    "has a pre-hook": (lambda: network(change=lambda c: c.register_forward_pre_hook(lambda *_: None)), "it has hooks"),
    "has a backward hook": (
        lambda: network(change=lambda c: c.register_full_backward_hook(lambda *_: None)),
        "it has hooks",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_plain_layer_cannot_do(what):
    make, reason = REFUSED[what]
    model = make()
    snapshot = Snapshot(model)
    with pytest.raises(ValueError, match=rf"^2 .*{reason}.*as before.*ignored_layers"):
        bake_weights(model, X)
    snapshot.check()
    before = model(X).detach()
    assert list(bake_weights(model, X, ignored_layers=[model[2]]).baked) == ["0"]
    close(model(X), before)


def test_weights_of_an_unknown_hook():
    model = network(nn.Conv2d)
    source = model[2].weight
    del model[2]._parameters["weight"]
    model[2].source = source
    model[2].register_forward_pre_hook(lambda module, _: setattr(module, "weight", module.source.tanh()))
    before = model(X).detach()
    assert "2" in bake_weights(model, X).baked
    close(model(X), before)
    torch.testing.assert_close(model[2].weight, source.tanh())


def test_what_is_not_called_or_calls_nothing_is_listed():
    model = network()
    model.add_module("spare", nn.Identity())
    model.spare.conv = weight_norm(nn.Conv2d(3, 3, 1))
    model.spare.plain = nn.Conv2d(3, 3, 1)
    model[8] = Tanh(6, 4)
    report = bake_weights(model, X)
    assert set(report.baked) == {"0", "2"} and set(report.left_out) == {"spare.conv", "8"}
    assert "does not call it" in report.left_out["spare.conv"] and "calls no" in report.left_out["8"]
    assert "left alone: 8" in str(report)


def test_fine_layers_of_other_classes_stay():
    model = nn.Sequential(Cast(5, 3), nn.MultiheadAttention(3, 1)).eval()
    first = model[0]
    report = bake_weights(model, torch.randn(2, 5), forward_fn=lambda m, x: m[1](*[m[0](x)] * 3))
    assert not report.baked and not report.left_out.keys() - {"1.out_proj"} and model[0] is first


class Shared(nn.Module):
    """One layer under two names, called twice at different sizes."""

    def __init__(self):
        super().__init__()
        self.a = StdConv2d(3, 3, 3)
        self.b = nn.Sequential(self.a, nn.ReLU())

    def forward(self, x):
        return self.b(self.a(x))


def test_shared_layers_stay_shared():
    model = Shared().eval()
    before = model(X).detach()
    assert list(bake_weights(model, X).baked) == ["a"]
    assert model.a is model.b[0] and type(model.a) is nn.Conv2d
    close(model(X), before)


class Hidden(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = StdConv2d(3, 4, 3)
        self.also = [self.conv]

    def forward(self, x):
        return self.also[0](x)


class SetsWeight(nn.Module):
    """A wrapper that puts the weight into the layer from outside."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.source = nn.Parameter(self.conv.weight.detach().clone())
        del self.conv._parameters["weight"]
        self.conv.weight = self.source.detach()

    def forward(self, x):
        self.conv.weight = self.source.tanh()
        return self.conv(x)


@pytest.mark.parametrize(("make", "reason"), [(Hidden, "still calls the old layer conv"), (SetsWeight, "as before")])
def test_a_network_that_does_not_take_the_plain_layers_is_as_before(make, reason):
    model = make().eval()
    layer, before = model.conv, model(X).detach()
    snapshot = Snapshot(model)
    with pytest.raises(ValueError, match=reason):
        bake_weights(model, X)
    snapshot.check()
    assert model.conv is layer
    torch.testing.assert_close(model(X), before)


def test_interrupted_it_is_as_before(monkeypatch):
    model = network()
    snapshot = Snapshot(model)
    calls = []

    def forward(net, x):
        calls.append(type(net[0]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return net(x)

    with pytest.raises(KeyboardInterrupt):
        bake_weights(model, X, forward_fn=forward)
    assert calls == [StdConv2d, nn.Conv2d]
    snapshot.check()


def test_frozen_layers_stay_frozen_and_old_optimizers_are_warned_of():
    model = network()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bake_weights(model, X)
    assert not model[0].weight.requires_grad and not model[0].bias.requires_grad and model[2].weight.requires_grad
    with pytest.warns(UserWarning, match=r"trains 6 of 10 parameters that pruning has replaced"):
        optimizer.step()


def test_errors_of_the_network_and_of_the_caller():
    with pytest.raises(TracingError, match="does not run on example_inputs: RuntimeError"):
        bake_weights(network(), torch.randn(2, 5, 17, 17))
    with pytest.raises(ValueError, match="it is the model itself"):
        bake_weights(StdConv2d(3, 4, 3), X)
    with pytest.raises(TypeError):
        bake_weights(lambda x: x, X)
