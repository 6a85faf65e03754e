"""What cannot be counted is named: kernels, functions and scripts that hide multiply-accumulates."""

import json
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import nn
from torchvision.models import googlenet, mobilenet_v3_small, swin_v2_t

from helpers.operation_cases import Function, X, deform, mean
from tp_importance import Budget, BudgetPruner, count_ops
from tp_importance.graph.tracing import trace
from tp_importance.pruning.plan import Plan
from tp_importance.pruning.report import PruningReport
from tp_importance.testing import make_network

# --- what cannot be counted is named ----------------------------------------------------------------------------------


class Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        return torch.from_numpy(x.numpy() @ weight.detach().numpy())

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class OwnKernel(nn.Module):
    """Multiplies where nobody sees it."""

    def __init__(self, width):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.eye(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x):
        return Hidden.apply(x.detach().clone(), self.weight) + 0 * x + self.bias


class Codebook(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.codes = nn.Parameter(torch.randn(5, width))

    def forward(self, x):
        return x + torch.cdist(x, self.codes).sum()


def named(layer):
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8), layer, nn.Linear(8, 4))


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (OwnKernel, "OwnKernel reads its weight out of sight"),
        (Codebook, "the operations of cdist on 3.codes are not counted"),
    ],
)
def test_what_is_not_counted_is_named_everywhere(layer, reason):
    model, x = named(layer(8)), torch.randn(4, 8)
    importance = tp.importance.MagnitudeImportance(p=1)
    with pytest.warns(UserWarning, match=f"not counted.*3: {reason}"):
        pruner = BudgetPruner(model, x, budget=Budget(macs=0.8), importance=importance)
    plan = pruner.plan()
    assert plan.uncounted == {"3": reason}
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    report = pruner.step()
    assert report.uncounted == {"3": reason} and f"not counted: 3: {reason}" in str(report)
    assert PruningReport.from_dict(json.loads(report.to_json())) == report


class Mixes(nn.Module):
    """A function of maps with 3 channels and raw parameters, beside layers that are counted."""

    def __init__(self, fn):
        super().__init__()
        self.fn, self.routing, self.kernel = fn, nn.Linear(3, 2), nn.Linear(3, 27)
        self.experts, self.w = nn.Parameter(torch.randn(2, 4 * 27)), nn.Parameter(torch.randn(4, 3, 3, 3))
        self.bias, self.scale = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(3))
        self.register_buffer("blur", torch.ones(3, 1, 3, 3))

    def forward(self, x):
        return self.fn(self, x)


def cond_conv(m, x):
    routes = m.routing(mean(x)).softmax(0)
    return F.conv2d(x, (routes @ m.experts).view(4, 3, 3, 3), m.bias)


def cond_conv_per_sample(m, x):
    routes = m.routing(x.mean((2, 3))).softmax(1)
    kernels = (routes[:, :, None] * m.experts).sum(1).view(-1, 3, 3, 3)
    return F.conv2d(x.flatten(0, 1)[None], weight=kernels, groups=len(x)).view(len(x), 4, 6, 6)


def scripted_conv(x, w):
    return torch.conv2d(x, w, padding=1)


def scripted_scale(x, scale):
    return x * scale[:, None, None]


def as_script(fn):
    with warnings.catch_warnings():  # deprecated, but there are networks that do it
        warnings.simplefilter("ignore")
        return torch.jit.script(fn)


def each(m, x):
    return torch.vmap(lambda z: F.conv2d(z[None], m.w, padding=1)[0])(x)


# what it computes, what is named, why, MACs per sample that are counted for all that
NAMED = {
    "conditional convolution": (cond_conv, "experts", "conv2d on a kernel computed from data and experts", None),
    "one kernel per sample": (
        cond_conv_per_sample,
        "experts",
        "conv2d on a kernel computed from data and experts",
        6,
    ),
    "modulated linear": (
        lambda m, x: F.linear(x.movedim(1, 3), m.w[:, :, 0, 0] * mean(x)),
        "w",
        "linear on a kernel computed from data and w",
        0,
    ),
    "modulated, then scaled": (
        lambda m, x: F.conv_transpose2d(
            x, (m.w * mean(x)[:, None, None]).transpose(0, 1) * m.scale[:, None, None, None]
        ),
        "w",
        "conv_transpose2d on a kernel computed from data and w",
        0,
    ),
    "bilinear": (
        lambda m, x: F.bilinear(x.movedim(1, 3), x.movedim(1, 3), m.w[..., 0] * mean(x)),
        "w",
        "bilinear on a kernel computed from data and w",
        0,
    ),
    "deformable": (deform, "w", "deform_conv2d on a kernel computed from data and w", 0),
    "kernel made by a layer": (
        lambda m, x: F.conv2d(x, m.kernel(mean(x)).view(1, 3, 3, 3)),
        "kernel",
        "conv2d on a kernel computed from data and kernel.weight",
        None,
    ),
    "script": (lambda m, x: as_script(scripted_conv)(x, m.w), "w", "script scripted_conv on w", 0),
    "script by keyword": (lambda m, x: as_script(scripted_conv)(x, w=m.w * 2), "w", "script scripted_conv on w", 0),
    "vmap over data": (each, "w", "conv2d on w under vmap", 0),
    "vmap over weights": (
        lambda m, x: torch.vmap(lambda v: F.linear(x, v))(m.w[:, :, 0, :1].expand(4, 3, 8)),
        "w",
        "linear on w under vmap",
        0,
    ),
    "vmap of a layer": (
        lambda m, x: torch.vmap(m.routing)(x.movedim(1, 3)),
        "routing",
        "linear on routing.weight under vmap",
        None,
    ),
    "buffer": (
        lambda m, x: F.conv2d(x, m.blur, groups=3),
        "blur",
        "conv2d on a kernel that is a buffer (blur)",
        0,
    ),
}


@pytest.mark.parametrize("case", NAMED)
def test_kernels_without_a_parameter_of_their_own_are_named(case):
    fn, name, reason, macs = NAMED[case]
    model, x = Mixes(fn).eval(), torch.randn(2, 3, 8, 8)
    traced = trace(model, x)
    assert traced.uncounted == {name: f"the operations of {reason} are not counted"}
    if macs is not None:
        assert count_ops(model, x)[0] == macs


@pytest.mark.parametrize(
    "fn",
    [
        lambda m, x: as_script(scripted_scale)(x, m.scale),
        lambda m, x: F.conv2d(x, as_script(scripted_scale)(m.w, m.scale)),
        lambda m, x: F.conv2d(x, x[:1, :, :3, :3]),
    ],
    ids=["script of a vector", "script of weights alone", "kernel of data alone"],
)
def test_scripts_and_kernels_that_hide_nothing_are_not_named(fn):
    model, call = Mixes(fn).eval(), torch.jit.ScriptFunction.__call__
    assert not trace(model, X).uncounted
    assert torch.jit.ScriptFunction.__call__ is call
    with pytest.raises(ZeroDivisionError):
        count_ops(model, X, forward_fn=lambda m, x: m(x) / (1 // 0))
    assert torch.jit.ScriptFunction.__call__ is call


def test_activations_are_not_kept():
    kept = []

    def fn(m, x):
        kept.append(weakref.ref(activation := F.conv2d(x, m.w)))
        out = activation.sum()
        del activation
        assert kept[0]() is None
        return out + x

    count_ops(Mixes(fn), X)


class Token(nn.Module):
    """Has a weight that this input does not need."""

    def __init__(self):
        super().__init__()
        self.body, self.mask = nn.Linear(8, 4), nn.Parameter(torch.zeros(1, 8))

    def forward(self, x, masked=None):
        return self.body(x if masked is None else torch.where(masked, self.mask, x))


def test_unused_weights_are_not_named():
    assert not trace(Token(), torch.randn(4, 8)).uncounted
    assert trace(OwnKernel(8), torch.randn(4, 8)).uncounted == {"weight": "OwnKernel reads its weight out of sight"}


def test_inputs_that_are_drawn_are_data():
    model = Function(lambda m, x, w: x @ w, (8, 5))
    assert count_ops(model, torch.zeros(2, 1), forward_fn=lambda m, _: m(torch.randn(2, 6, 8)))[0] == 6 * 8 * 5


@pytest.mark.parametrize("name", ["plain", "residual", "se", "transformer_mlp", "depthwise", "transposed"])
def test_ordinary_networks_have_nothing_to_name(name):
    model, x = make_network(name)
    traced = trace(model, x)
    assert not traced.functional and not traced.uncounted


# size of the images, MACs of two samples: of layers, of functions
TORCHVISION = {
    "mobilenet": (mobilenet_v3_small, 64, 13032960, 0),
    "swin": (swin_v2_t, 64, 503854080, 1132462080),
    "googlenet": (lambda: googlenet(init_weights=False), 96, 552095744, 0),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TORCHVISION)
def test_networks_of_torchvision_have_nothing_to_name(name):
    build, size, layers, functions = TORCHVISION[name]
    traced = trace(build().eval(), torch.randn(2, 3, size, size))
    assert (sum(call.macs for call in traced.calls), sum(traced.functional.values())) == (layers, functions)
    assert not traced.uncounted
