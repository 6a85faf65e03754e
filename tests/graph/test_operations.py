"""Multiply-accumulates of functions that read parameters."""

import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import nn
from torchvision.ops import DeformConv2d

from helpers.operation_cases import Function, X
from tp_importance import Budget, BudgetPruner, count_ops, prunable_groups
from tp_importance.budget import Cost
from tp_importance.graph.cost import CostModel
from tp_importance.graph.surgery import remove_units
from tp_importance.graph.tracing import trace
from tp_importance.testing.networks import conv_bn_relu, head

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


def test_products_of_data_with_data_are_counted_apart():
    model, x = Function(lambda m, x, w: (x * w) @ x.mT, (8,)).eval(), torch.randn(2, 6, 8)
    assert count_ops(model, x)[0] == 6 * 6 * 8 and count_ops(model, x, attention=False)[0] == 0
    traced = trace(model, x)
    assert traced.products == 2 * 6 * 6 * 8 and not traced.functional and not traced.uncounted


LAYERS = {
    "LSTM": (lambda: nn.LSTM(8, 4, batch_first=True), 6 * 4 * 4 * (8 + 4)),
    "two layers, both ways": (
        lambda: nn.GRU(8, 4, num_layers=2, bidirectional=True, batch_first=True),
        6 * 3 * 4 * (2 * (8 + 4) + 2 * (8 + 4)),
    ),
    "projected": (lambda: nn.LSTM(8, 4, proj_size=2, batch_first=True), 6 * (16 * 8 + 16 * 2 + 2 * 4)),
    "RNN": (lambda: nn.RNN(8, 4, batch_first=True), 6 * 4 * (8 + 4)),
    "LayerNorm": (lambda: nn.LayerNorm([6, 8]), 0),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(8, 2, batch_first=True), 4 * 6 * 8 * 8 + 2 * 6 * 6 * 8),
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
