import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from helpers.states import state
from tp_importance.graph.dataflow import Value, is_batchnorm, record


class Run(nn.Module):
    """A convolution, then `fn`."""

    def __init__(self, fn, **modules):
        super().__init__()
        self.fn = fn
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.fn(self, self.conv(x))


X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def flow_of(fn, **modules):
    torch.manual_seed(0)
    return record(Run(fn, **modules), X)


def last(fn, **modules):
    return flow_of(fn, **modules).ops[-1]


KINDS = {
    "relu": [
        lambda m, y: F.relu(y),
        lambda m, y: F.relu(y, inplace=True),
        lambda m, y: y.relu_(),
        lambda m, y: torch.relu(y),
        lambda m, y: F.leaky_relu(y, 0.2),
        lambda m, y: nn.ReLU(inplace=True)(y),
    ],
    "same": [
        lambda m, y: y.clone(),
        lambda m, y: y.contiguous(),
        lambda m, y: y.to(torch.float64),
        lambda m, y: y.to(memory_format=torch.channels_last),
        lambda m, y: y + 0,
        lambda m, y: 0 + y,
        lambda m, y: F.dropout(y, 0.5, training=False),
        lambda m, y: nn.Dropout2d().eval()(y),
    ],
    "homogeneous": [
        lambda m, y: F.max_pool2d(y, 2),
        lambda m, y: F.avg_pool2d(y, 3, 1, 1),
        lambda m, y: F.adaptive_avg_pool2d(y, 1),
        lambda m, y: F.adaptive_max_pool2d(y, 2),
        lambda m, y: y.flatten(1),
        lambda m, y: y.view(2, -1),
        lambda m, y: y.mean((2, 3)),
        lambda m, y: y[:, ::2],
        lambda m, y: y.permute(0, 2, 3, 1),
        lambda m, y: F.pad(y, (1, 1, 1, 1)),
        lambda m, y: F.pad(y, (1, 1, 1, 1), mode="reflect"),
        lambda m, y: F.interpolate(y, scale_factor=2),
        lambda m, y: y * 2,
        lambda m, y: 0.5 * y,
        lambda m, y: y.mul_(3.0),
        lambda m, y: y / 2,
    ],
    "add": [lambda m, y: y + y.relu(), lambda m, y: torch.add(y, y), lambda m, y: y.add_(y.abs())],
    "cat": [lambda m, y: torch.cat([y, y], 1), lambda m, y: torch.cat((y, y), dim=1)],
    "other": [
        lambda m, y: F.relu6(y),
        lambda m, y: F.silu(y),
        lambda m, y: y.sigmoid(),
        lambda m, y: F.gelu(y),
        lambda m, y: y + 1,
        lambda m, y: y * -1,
        lambda m, y: y * 0,
        lambda m, y: 2 / y,
        lambda m, y: y * y,
        lambda m, y: y - y.relu(),
        lambda m, y: torch.add(y, y, alpha=2),
        lambda m, y: torch.div(y, 2, rounding_mode="floor"),
        lambda m, y: F.pad(y, (1, 1, 1, 1), value=1.0),
        lambda m, y: torch.cat([y, y], 0),
        lambda m, y: torch.cat([y, y]),
        lambda m, y: y.to(torch.int32),
        lambda m, y: F.dropout(y, 0.5, training=True),
        lambda m, y: F.softmax(y, 1),
        lambda m, y: F.layer_norm(y, (6,)),
        lambda m, y: torch.ops.aten.sigmoid(y),
        lambda m, y: y.unsqueeze(-1).relu_(),  # changes y, too
    ],
}


@pytest.mark.parametrize(("kind", "i"), [(k, i) for k, fns in KINDS.items() for i in range(len(fns))])
def test_kinds(kind, i):
    op = last(KINDS[kind][i])
    assert op.kind == kind, op
    assert op.module is None and op.inputs and op.outputs


@pytest.mark.parametrize("kind", ["same", "homogeneous", "relu"])
def test_what_lets_a_factor_pass(kind):
    """By definition: f(r y) = r f(y) on the values, and the identity for y ≥ 0."""
    for fn in KINDS[kind]:
        torch.manual_seed(0)
        y = torch.randn(2, 4, 6, 6)
        torch.testing.assert_close(fn(None, 3 * y), 3 * fn(None, y.clone()), check_stride=False)
        if kind != "homogeneous":
            assert torch.equal(fn(None, y.abs()).to(y), y.abs())


LAYERS = [nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1), nn.ConvTranspose2d(4, 2, 2), nn.SyncBatchNorm(4), FrozenBatchNorm2d(4)]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda m: type(m).__name__)
def test_layers_are_one_operation(layer):
    flow = flow_of(lambda m, y: m.layer(y), layer=layer)
    assert [(op.name, op.kind) for op in flow.ops] == [("conv", "layer"), ("layer", "layer")]
    assert flow.ops[1].inputs == flow.ops[0].outputs and flow.outputs == flow.ops[1].outputs
    assert flow.calls(layer) == [flow.ops[1]] and not flow.spans


class BNReLU(nn.BatchNorm2d):
    """As in timm: the activation is inside."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(super().forward(x))


def test_is_batchnorm():
    assert is_batchnorm(nn.BatchNorm2d(3)) and is_batchnorm(FrozenBatchNorm2d(3)) and is_batchnorm(nn.SyncBatchNorm(3))
    assert is_batchnorm(nn.BatchNorm2d(3, affine=False))
    for module in (nn.BatchNorm2d(3, track_running_stats=False), nn.GroupNorm(1, 3), BNReLU(3), nn.ReLU(), None):
        assert not is_batchnorm(module)


def test_further_layers_hide_what_is_inside():
    inner = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())
    flow = record(Run(lambda m, y: m.block(y).relu(), block=inner), X, layers={nn.Sequential: "homogeneous"})
    assert [(op.name, op.kind) for op in flow.ops] == [("conv", "layer"), ("block", "homogeneous"), ("relu", "relu")]


def test_values_and_consumers():
    flow = flow_of(lambda m, y: (y.relu() + y, y.shape[0], y.size(1), y.dim(), len(y), y.is_contiguous(), y.device))
    conv, relu, add = flow.ops  # questions are no operations
    y = conv.outputs[0]
    assert relu.inputs == (y,) and set(add.inputs) == {y, *relu.outputs}
    assert flow.consumers[y] == [relu, add] and flow.maker[y] is conv and conv.inputs[0] not in flow.maker
    assert add.args == (Value(relu.outputs[0]), Value(y)) and flow.outputs == add.outputs
    assert flow.shapes[conv.inputs[0]] == (2, 3, 6, 6) and flow.shapes[y] == (2, 4, 6, 6)


def test_what_reads_values_is_an_operation():
    for ask in (
        lambda y: float(y.max()),
        lambda y: bool((y > 0).any()),
        lambda y: y.sum().item(),
        lambda y: y.tolist(),
    ):
        flow = flow_of(lambda m, y, ask=ask: (ask(y), y)[1])
        assert flow.ops[-1].kind == "other" and not flow.ops[-1].outputs


def test_in_place_results_are_new():
    def fn(m, y):
        z = y
        y.relu_()
        return z

    flow = flow_of(fn)
    conv, relu = flow.ops
    assert relu.inputs == conv.outputs and relu.outputs != conv.outputs and flow.outputs == relu.outputs


@pytest.mark.parametrize(
    "change",
    [
        lambda y: y.__setitem__((slice(None), 0), -1.0),
        lambda y: y[:, :2].sub_(1),
        lambda y: y[:, :2].relu_(),
        lambda y: y.view(2, -1).neg_(),
    ],
)
def test_a_tensor_changed_through_a_view_is_another(change):
    flow = flow_of(lambda m, y: (y.relu_(), change(y), y.relu())[2])
    op, again = flow.ops[-2:]
    assert op.kind == "other" and again.inputs[0] in op.outputs
    assert not flow.nonnegative[again.inputs[0]]  # although relu(y) was


def test_views_taken_before():
    def fn(m, y):
        view = y[:, :2]
        y.add_(1)
        return view

    flow = flow_of(fn)
    assert flow.ops[-1].kind == "other" and flow.outputs[0] in flow.ops[-1].outputs


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x + 1

    @staticmethod
    def backward(ctx, g):
        return 2 * g


def test_inside_of_autograd_functions():
    flow = flow_of(lambda m, y: Double.apply(y))
    assert [(op.name, op.kind) for op in flow.ops[1:]] == [("mul", "homogeneous"), ("add", "other")]
    assert flow.ops[1].inputs == flow.ops[0].outputs and flow.outputs == flow.ops[2].outputs


class Scripted(nn.Module):
    def __init__(self):
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated, but in use
            self.fn = torch.jit.script(torch.nn.functional.silu)

    def forward(self, x):
        return self.fn(x)


def test_what_a_module_does_out_of_sight():
    flow = flow_of(lambda m, y: F.relu(m.act(y)), act=Scripted())
    conv, hidden, relu = flow.ops
    assert hidden.kind == "other" and hidden.inputs == conv.outputs and hidden.outputs == relu.inputs


def test_spans():
    def fn(m, y):
        return m.pair((y, y))[0] + m.act(m.act(y))

    class Pair(nn.Module):
        def forward(self, pair):
            return [pair[0] + pair[1]]

    flow = flow_of(fn, act=nn.ReLU(), pair=Pair(), unused=nn.ReLU())
    assert [s.name for s in flow.spans] == ["pair", "act", "act"]
    pair, one, two = flow.spans
    assert not pair.plain and one.plain and pair.inputs == (flow.ops[0].outputs * 2) and two.inputs == one.outputs
    assert [flow.ops[i].name for s in flow.spans for i in s.ops] == ["add", "relu", "relu"]


POSITIVE = {
    True: [
        lambda m, y: y.relu(),
        lambda m, y: F.max_pool2d(y.relu(), 2),
        lambda m, y: torch.cat([y.relu(), y.sigmoid()], 1),
        lambda m, y: y.relu() + y.abs(),
        lambda m, y: F.relu6(y) * 2,
        lambda m, y: F.leaky_relu(y.relu(), -0.5),
        lambda m, y: F.interpolate(y.relu(), scale_factor=2, mode="bilinear"),
        lambda m, y: y.clamp(min=0),
        lambda m, y: F.hardtanh(y, 0.0, 1.0),
        lambda m, y: y.relu().flatten(1).mean(1),
    ],
    False: [
        lambda m, y: y,
        lambda m, y: y.relu() + y,
        lambda m, y: F.leaky_relu(y),
        lambda m, y: -y.relu(),
        lambda m, y: y.relu() - 1,
        lambda m, y: F.interpolate(y.relu(), scale_factor=2, mode="bicubic"),
        lambda m, y: y.clamp(max=0),
        lambda m, y: F.hardtanh(y),
        lambda m, y: m.layer(y.relu()),
        lambda m, y: F.pad(y.relu(), (1, 1), value=-1.0),
        lambda m, y: F.silu(y.relu()),
        lambda m, y: y.relu() + m.conv.bias.view(-1, 1, 1),
    ],
}


@pytest.mark.parametrize(("expected", "i"), [(e, i) for e, fns in POSITIVE.items() for i in range(len(fns))])
def test_nonnegative(expected, i):
    flow = flow_of(POSITIVE[expected][i], layer=nn.BatchNorm2d(4))
    assert flow.nonnegative[flow.outputs[0]] is expected


@pytest.mark.parametrize("fails", [True, False])
def test_the_model_is_left_alone(fails):
    def fn(m, y):
        if fails:
            raise LookupError("here")
        return m.bn(y)

    model = Run(fn, bn=nn.BatchNorm2d(4), act=nn.ReLU())
    model.train().bn.eval()
    model.conv.weight.requires_grad_(False)
    handle = model.act.register_forward_hook(lambda *_: None)
    before = state(model)
    if fails:
        with pytest.raises(LookupError, match="here"):
            record(model, X)
    else:
        record(model, X)
    assert [m.training for m in model.modules()] == [True, True, False, True]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not model.conv.weight.requires_grad and model.conv.bias.requires_grad
    hooks = [h for m in model.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]
    assert hooks == [handle.id]
    assert torch.relu(X).sum() > 0 and not torch.overrides._get_current_function_mode_stack()


def test_inputs_of_all_forms():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, a, b=None):
            return {"sum": self.conv(a) + self.conv(b)}

    model = Two()
    flows = [
        record(model, (X, X + 1)),
        record(model, {"a": X, "b": X + 1}),
        record(model, [X, X + 1], forward_fn=lambda m, inputs: m(inputs[0], b=inputs[1])),
    ]
    assert [[op.name for op in f.ops] for f in flows] == [["conv", "conv", "add"]] * 3
    assert all(len(f.calls(model.conv)) == 2 and len(f.outputs) == 1 for f in flows)
    with pytest.raises(TypeError, match="example_inputs"):
        record(model, "x")
