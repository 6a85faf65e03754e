"""MACs of functions that read parameters, and what is named because it cannot be counted."""

import json
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import nn
from torchvision.models import googlenet, mobilenet_v3_small, swin_v2_t
from torchvision.ops import DeformConv2d, deform_conv2d

from tp_importance import Budget, BudgetPruner, Cost, Plan, PruningReport, count_ops, prunable_groups
from tp_importance.graph.cost import CostModel
from tp_importance.graph.surgery import remove_units
from tp_importance.graph.tracing import trace
from tp_importance.testing import make_network
from tp_importance.testing.networks import conv_bn_relu, head

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Function(nn.Module):
    """One function of an input of shape (2, 6, 8) and a parameter."""

    def __init__(self, fn, *shapes):
        super().__init__()
        self.fn = fn
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in shapes])
        self.register_buffer("constant", torch.randn(8, 8))

    def forward(self, x):
        return self.fn(self, x, *self.weights)


# what it computes on x of shape (2, 6, 8), shapes of the parameters, MACs per sample
COUNTED = {
    "linear": (lambda m, x, w, b: F.linear(x, w, b), [(5, 8), (5,)], 6 * 8 * 5),
    "linear by keyword": (lambda m, x, w: F.linear(input=x, weight=w), [(5, 8)], 6 * 8 * 5),
    "conv1d": (lambda m, x, w: F.conv1d(x, w, padding=1), [(4, 6, 3)], 8 * 4 * 6 * 3),
    "conv2d": (lambda m, x, w: F.conv2d(x[:, :, None], w, groups=2), [(4, 3, 1, 1)], 8 * 4 * 3),
    "conv_transpose1d": (lambda m, x, w: F.conv_transpose1d(x, w, stride=2), [(6, 4, 2)], 8 * 6 * 4 * 2),
    "matmul": (lambda m, x, w: x @ w, [(8, 5)], 6 * 8 * 5),
    "matmul of a vector": (lambda m, x, w: x @ w, [(8,)], 6 * 8),
    "a matrix and a vector": (lambda m, x, w: torch.stack([w @ row for row in x.flatten(1)]), [(5, 48)], 48 * 5),
    "transposed": (lambda m, x, w: torch.matmul(x, w.t()), [(5, 8)], 6 * 8 * 5),
    "bmm": (lambda m, x, w: torch.bmm(x, w.expand(2, 8, 5)), [(1, 8, 5)], 6 * 8 * 5),
    "mm": (lambda m, x, w: torch.mm(x.flatten(1), w), [(48, 5)], 48 * 5),
    "addmm": (lambda m, x, w, b: torch.addmm(b, x.flatten(1), w), [(48, 5), (5,)], 48 * 5),
    "einsum": (lambda m, x, w: torch.einsum("btc,cd->btd", x, w), [(8, 5)], 6 * 8 * 5),
    "einsum with dots": (lambda m, x, w: torch.einsum("...c, dc -> ...d", x, w), [(5, 8)], 6 * 8 * 5),
    "tensordot": (lambda m, x, w: torch.tensordot(x, w, dims=([1, 2], [0, 1])), [(6, 8, 5)], 48 * 5),
    "bilinear": (lambda m, x, w: F.bilinear(x, x, w), [(5, 8, 8)], 6 * 5 * 8 * 8),
    "weights made of weights": (lambda m, x, v, w: x @ (v @ w), [(8, 2), (2, 5)], 6 * 8 * 5),
    "weights and a constant": (lambda m, x, w: x @ (w * m.constant).softmax(0), [(8, 8)], 6 * 8 * 8),
    "twice": (lambda m, x, w: x @ w @ w, [(8, 8)], 2 * 6 * 8 * 8),
    "attention": (
        lambda m, x, i, o, b: F.multi_head_attention_forward(
            *[x.transpose(0, 1)] * 3, 8, 2, i, None, None, None, False, 0.0, o, b
        )[0],
        [(24, 8), (8, 8), (8,)],
        4 * 6 * 8 * 8,
    ),
    "matmul by keyword": (lambda m, x, w: torch.matmul(input=x, other=w), [(8, 5)], 6 * 8 * 5),
    "a weight cast to the data's type": (lambda m, x, w: F.linear(x, w.to(x)), [(5, 8)], 6 * 8 * 5),
    "a jvp": (lambda m, x, w: torch.func.jvp(lambda z: z @ w, (x,), (x,))[0], [(8, 5)], 6 * 8 * 5),
    "vmap over data alone": (lambda m, x, w: torch.vmap(torch.sin)(x) @ w, [(8, 5)], 6 * 8 * 5),
    "a kernel of weights and a buffer": (lambda m, x, w: F.linear(x, w * m.constant), [(8, 8)], 6 * 8 * 8),
    "einsum in a list": (lambda m, x, w: torch.einsum("dc,btc->dbt", [w, x]), [(5, 8)], 6 * 8 * 5),
    # no operations of data with weights
    "scale and shift": (lambda m, x, w, b: x * w + b, [(6, 8), (8,)], 0),
    "embedding": (lambda m, x, w: F.embedding(x.argmax(2), w), [(8, 5)], 0),
    "a matrix that is a buffer": (lambda m, x, w: (x @ m.constant) * w, [(8,)], 0),
    "data with data": (lambda m, x, w: (x * w) @ x.mT, [(8,)], 0),
    "weights that are data": (lambda m, x, b: F.linear(x, x[0].detach(), b), [(6,)], 0),
    "weights with weights": (lambda m, x, v, w: x + (v @ w).sum(), [(8, 2), (2, 5)], 0),
    "weights with positions": (lambda m, x, w: x + torch.arange(6.0)[:, None] @ w, [(1, 8)], 0),
}


@pytest.mark.parametrize("name", COUNTED)
def test_functions_are_counted(name):
    fn, shapes, macs = COUNTED[name]
    model, x = Function(fn, *shapes).eval(), torch.randn(2, 6, 8)
    assert count_ops(model, x) == (macs, sum(p.numel() for p in model.parameters()))
    traced = trace(model, x)
    assert sum(traced.functional.values()) == 2 * macs and not traced.uncounted


LAYERS = {
    "LSTM": (lambda: nn.LSTM(8, 4, batch_first=True), 6 * 4 * 4 * (8 + 4)),
    "two layers, both ways": (
        lambda: nn.GRU(8, 4, num_layers=2, bidirectional=True, batch_first=True),
        6 * 3 * 4 * (2 * (8 + 4) + 2 * (8 + 4)),
    ),
    "projected": (lambda: nn.LSTM(8, 4, proj_size=2, batch_first=True), 6 * (16 * 8 + 16 * 2 + 2 * 4)),
    "RNN": (lambda: nn.RNN(8, 4, batch_first=True), 6 * 4 * (8 + 4)),
    "LayerNorm": (lambda: nn.LayerNorm([6, 8]), 0),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(8, 2, batch_first=True), 4 * 6 * 8 * 8),
    "Embedding": (lambda: nn.Sequential(nn.Flatten(), Index(), nn.Embedding(48, 5)), 0),
    "Bilinear": (lambda: Twice(nn.Bilinear(8, 8, 5)), 6 * 5 * 8 * 8),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 5)), 6 * 8 * 5),
    "orthogonal": (lambda: nn.utils.parametrizations.orthogonal(nn.Linear(8, 8)), 6 * 8 * 8),
}


class Index(nn.Module):
    def forward(self, x):
        return x.argmax(1)


class Twice(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x, x)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_counted(name):
    build, macs = LAYERS[name]
    layer, x = build().eval(), torch.randn(2, 6, 8)
    run = (lambda m, x: m(x, x, x)) if name == "MultiheadAttention" else None
    assert count_ops(layer, x, forward_fn=run)[0] == macs
    cell = nn.LSTMCell(8, 4)
    assert count_ops(cell, x[:, 0])[0] == 4 * 4 * (8 + 4)


def test_packed_sequences_count_their_time_steps():
    rnn = nn.GRU(8, 4, batch_first=True)
    packed = lambda m, x: m(nn.utils.rnn.pack_padded_sequence(x, [6, 2], batch_first=True))  # noqa: E731
    assert count_ops(rnn, torch.randn(2, 6, 8), forward_fn=packed)[0] == 8 * 3 * 4 * (8 + 4) // 2


class Deformable(nn.Module):
    """A deformable convolution in the middle, with most of the MACs."""

    def __init__(self):
        super().__init__()
        self.stem, self.squeeze = conv_bn_relu(3, 16), conv_bn_relu(16, 24)
        self.offset = nn.Conv2d(24, 18, 3, padding=1)
        self.deform, self.tail, self.head = DeformConv2d(24, 24, 3, padding=1, groups=2), conv_bn_relu(24, 16), head(16)

    def forward(self, x):
        x = self.squeeze(self.stem(x))
        return self.head(self.tail(self.deform(x, self.offset(x))))


def test_a_budget_holds_for_deformable_convolutions():
    model = Deformable().eval()
    deform = 64 * 24 * 12 * 9
    without = sum(c.macs for c in trace(model, X).calls) // 2
    assert count_ops(model, X)[0] == without + deform
    pruner = BudgetPruner(model, X, budget=Budget(macs=0.85), importance=tp.importance.MagnitudeImportance(p=1))
    report = pruner.step()
    assert report.cost == Cost(*count_ops(model, X)) and report.cost.macs <= 0.85 * (without + deform)
    assert model.deform.weight.shape == (24, 12, 3, 3) and model.stem[0].out_channels < 16
    assert not report.uncounted


class RawLayers(nn.Module):
    """Prunable layers between functions of raw weights."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 12), nn.Linear(12, 10), nn.Linear(10, 4)
        self.mix, self.scale = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(12))

    def forward(self, x):
        return self.c(torch.relu(self.b(torch.relu(self.a(x @ self.mix)) * self.scale)))


def test_the_cost_model_knows_functions():
    model, x = RawLayers(), torch.randn(2, 6, 8)
    groups = prunable_groups(model, x)
    assert groups.names == ["a", "b"]  # verified: the cost of a pruned copy is what the model says
    cost = CostModel.from_groups(groups)
    assert cost.dense == Cost(*count_ops(model, x)) and cost.dense.macs == 6 * (64 + 96 + 120 + 40)
    pruner = BudgetPruner(model, x, budget=Budget(macs=0.6), importance=tp.importance.MagnitudeImportance(p=1))
    assert pruner.step().cost == Cost(*count_ops(model, x))


class RawDepthwise(nn.Module):
    """A depthwise filter that is no layer; Torch-Pruning cuts it, told along which axis."""

    def __init__(self):
        super().__init__()
        self.a, self.weight, self.c = nn.Conv2d(3, 8, 3), nn.Parameter(torch.randn(8, 1, 3, 3)), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.c(F.conv2d(torch.relu(self.a(x)), self.weight, groups=len(self.weight)))


def test_the_cost_of_a_parameter_follows_its_width():
    model = RawDepthwise()
    groups = prunable_groups(model, X, unwrapped_parameters=[(model.weight, 0)])
    assert groups.names == ["a"]
    cost = CostModel.from_groups(groups)
    assert cost.dense == Cost(*count_ops(model, X))
    assert cost.cost({"a": 5}).macs == 36 * 5 * 27 + 16 * 5 * 9 + 16 * 4 * 5
    remove_units(groups, {"a": [0, 3, 4]})
    assert cost.cost({"a": 5}) == Cost(*count_ops(model, X)) and len(model.weight) == 5


def test_a_parameter_is_followed_over_several_steps():
    model, importance = RawDepthwise(), tp.importance.MagnitudeImportance(p=1)
    options = {"unwrapped_parameters": [(model.weight, 0)], "budget": Budget(macs=0.8)}
    pruner = BudgetPruner(model, X, importance=importance, **options)
    for macs in (0.8, 0.5):
        report = pruner.step(Budget(macs=macs))
        assert report.cost.macs <= macs * report.dense.macs
        assert len(model.weight) == model.a.out_channels == model.c.in_channels == report.rows[0].after


class MixesTokens(nn.Module):
    """Runs once per channel of the layer in front."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.mix = nn.Linear(8, 12), nn.Linear(12, 4), nn.Parameter(torch.randn(6, 6))

    def forward(self, x):
        return self.b(self.product(torch.relu(self.a(x))))


@pytest.mark.parametrize(
    "product",
    [
        lambda m, x: m.mix @ x,
        lambda m, x: torch.einsum("bsc,st->btc", x, m.mix),
        lambda m, x: torch.tensordot(x, m.mix, dims=([1], [0])).transpose(1, 2),
    ],
    ids=["matmul", "einsum", "tensordot"],
)
def test_products_along_another_axis_are_named_and_their_channels_pruned(product):
    model, x = MixesTokens(), torch.randn(2, 6, 8)
    type(model).product = product
    groups = prunable_groups(model, x, ignored_layers=[model.mix])
    assert groups.names == ["a"] and list(groups.trace.uncounted) == ["mix"]
    assert count_ops(model, x)[0] == 6 * (96 + 48)


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


def mean(x):
    return x.mean((0, 2, 3))


def cond_conv(m, x):
    routes = m.routing(mean(x)).softmax(0)
    return F.conv2d(x, (routes @ m.experts).view(4, 3, 3, 3), m.bias)


def cond_conv_per_sample(m, x):
    routes = m.routing(x.mean((2, 3))).softmax(1)
    kernels = (routes[:, :, None] * m.experts).sum(1).view(-1, 3, 3, 3)
    return F.conv2d(x.flatten(0, 1)[None], weight=kernels, groups=len(x)).view(len(x), 4, 6, 6)


def deform(m, x):
    return deform_conv2d(x, x.new_zeros(len(x), 18, 8, 8), m.w * mean(x)[:, None, None], padding=1)


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
