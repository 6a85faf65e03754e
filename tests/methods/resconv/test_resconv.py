"""Conversion to residual convolutions, and fusing."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from torchvision.ops import FrozenBatchNorm2d

from tp_importance.methods.resconv import ResConv2d, convert_to_resconv, fuse, resconv_layers
from tp_importance.testing.networks import conv_bn_relu, head, randomise_batchnorm

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def net(*middle: nn.Module, width: int = 8) -> nn.Sequential:
    """Stem, then `middle`, then a head."""
    torch.manual_seed(0)
    model = nn.Sequential(conv_bn_relu(3, width), *middle, head(width))
    randomise_batchnorm(model, X)
    return model


def conv(kernel: int = 3, width: int = 8, **options) -> nn.Conv2d:
    options.setdefault("padding", options.get("dilation", 1) * (kernel - 1) // 2)
    return nn.Conv2d(width, width, kernel, **options)


def plain() -> nn.Sequential:
    return net(conv(bias=False), nn.BatchNorm2d(8), nn.ReLU(), conv(), nn.ReLU())


NORMS = {
    "none": lambda: None,
    "affine": lambda: nn.BatchNorm2d(8, eps=1e-3),
    "non-affine": lambda: nn.BatchNorm2d(8, affine=False),
    "frozen": lambda: FrozenBatchNorm2d(8),
    "sync": lambda: nn.SyncBatchNorm(8),
}
CONVS = {
    **{f"kernel {k}": {"kernel": k} for k in (1, 3, 5, 7)},
    "oblong": {"kernel": 3, "padding": (1, 1)},
    "dilated": {"dilation": 2},
    "groups": {"groups": 2},
    "depthwise": {"groups": 8, "bias": False},
    "no bias": {"bias": False},
    "same": {"padding": "same", "kernel": 5},
    "valid": {"padding": "valid", "kernel": 1},
    **{mode: {"padding_mode": mode, "kernel": 5} for mode in ("reflect", "replicate", "circular")},
    "same circular": {"padding": "same", "padding_mode": "circular", "dilation": 2},
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("options", CONVS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_fused_is_unfused(norm, options, dtype):
    torch.manual_seed(0)
    bn = NORMS[norm]()
    layer = ResConv2d(conv(**CONVS[options]), bn, s=-0.6, a=1.7)
    if bn is not None:
        for key in ("running_mean", "weight", "bias"):
            if getattr(bn, key) is not None:
                getattr(bn, key).data.normal_()
        bn.running_var.uniform_(0.1, 2)
    layer.to(dtype).eval()
    x = torch.randn(2, 8, 9, 7, dtype=dtype)
    y, fused = layer(x), layer.fused()
    assert type(fused) is nn.Conv2d and fused.bias is not None and fused.weight.dtype == dtype
    assert (fused(x) - y).abs().max() <= (1e-10 if dtype == torch.float64 else 1e-5 * y.abs().max())
    expected = layer.conv(x) if bn is None else bn(layer.conv(x))
    torch.testing.assert_close(y, -0.6 * expected + 1.7 * x)


@pytest.mark.parametrize("bn", [nn.BatchNorm2d(8, track_running_stats=False), nn.GroupNorm(2, 8), nn.ReLU()], ids=str)
def test_what_cannot_be_fused_is_refused_at_once(bn):
    with pytest.raises(ValueError, match="no batch norm with running statistics"):
        ResConv2d(conv(), bn)


BAD_CONVS = {
    "stride": ({"stride": 2}, r"stride \(2, 2\) is not 1"),
    "even": ({"kernel": 2}, "no centre"),
    "padding": ({"padding": 0}, "changes the size"),
    "too much": ({"padding": 2}, "changes the size"),
    "valid": ({"padding": "valid"}, "padding valid changes"),
    "dilation": ({"dilation": 2, "padding": 1}, "changes the size"),
}


@pytest.mark.parametrize("name", BAD_CONVS)
def test_convolutions_that_hold_no_shortcut(name):
    options, why = BAD_CONVS[name]
    with pytest.raises(ValueError, match=why):
        ResConv2d(conv(**options))
    model = net(conv(**options), conv())
    assert list(resconv_layers(convert_to_resconv(model, X))) == ["2"]
    assert why.replace("\\", "") in model.resconv_report.left_out["1"]
    assert "left alone: 1: " in str(model.resconv_report)
    with pytest.raises(ValueError, match="8 inputs and 4 outputs"):
        ResConv2d(nn.Conv2d(8, 4, 3, padding=1))


@pytest.mark.parametrize("a", [0.0, 1.0])
def test_conversion(a):
    model = plain()
    model.train()[2].eval()
    model[1].weight.requires_grad_(False)
    modes = {n: m.training for n, m in model.named_modules()}
    values = {id(p) for p in model.parameters()}
    y = copy.deepcopy(model).eval()(X)
    assert convert_to_resconv(model, X, a=a) is model
    report = model.resconv_report
    assert (report.converted, report.batchnorms) == (["1", "4"], {"1": "2"})
    assert report.left_out == {"0.0": "reads the network's input"}
    assert type(model[2]) is nn.Identity and {n: model.get_submodule(n).training for n in modes} == modes
    assert not model[1].bn.training and not model[1].conv.weight.requires_grad
    layers = resconv_layers(model)
    assert {id(p) for p in model.parameters()} == values | {id(p) for m in layers.values() for p in (m.s, m.a)}
    assert all(m.s.shape == m.a.shape == (1,) and m.s.item() == 1 and m.a.item() == a for m in layers.values())
    assert torch.equal(model.eval()(X), y) == (a == 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    model, x = plain().to(dtype).eval(), X.to(dtype)
    y = model(x)
    convert_to_resconv(model, x)
    assert torch.equal(model(x), y) and all(p.dtype == dtype for p in model.parameters())
    fuse(model)
    assert model(x).dtype == dtype and model[1].weight.dtype == dtype
    torch.testing.assert_close(model(x), y, rtol=0.05, atol=0.05)


def test_autocast_keeps_its_dtype():
    model = convert_to_resconv(net(conv()), X, a=0.5)
    seen = []
    model[1].register_forward_hook(lambda _m, args, out: seen.append((args[0].dtype, out.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        model(X)
    assert seen == [(torch.bfloat16, torch.bfloat16)]


def test_channels_last():
    model, x = plain().to(memory_format=torch.channels_last), X.to(memory_format=torch.channels_last)
    y = model.eval()(x)
    fuse(convert_to_resconv(model, x))
    torch.testing.assert_close(model(x), y)
    assert model[1].weight.is_contiguous(memory_format=torch.channels_last)


def test_copies_and_pickles():
    model = convert_to_resconv(plain(), X, s=0.5, a=0.25)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        assert twin.resconv_report == model.resconv_report and torch.equal(twin(X), model(X))
        assert twin[1].s is not model[1].s
        fuse(twin)
        assert len(resconv_layers(model)) == 2


def test_gradients_reach_both_scalars():
    model = convert_to_resconv(plain(), X).train()
    model(X).square().sum().backward()
    assert all(m.s.grad.abs() > 0 and m.a.grad.abs() > 0 for m in resconv_layers(model).values())


# --- which layers -----------------------------------------------------------------------------------------------------


class Scaled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Standardised(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean(), bias)


class Same(nn.Conv2d):
    """Only the constructor differs."""


def hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda _m, _x, out: out + 1)
    return layer


def patched(layer: nn.Module) -> nn.Module:
    layer.forward = lambda x: x + 1
    return layer


LEFT_OUT = {
    "subclass": (lambda: Scaled(8, 8, 1), "Scaled"),
    "inner": (lambda: Standardised(8, 8, 1), "Standardised"),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(conv()), "not that of a plain"),
    "pruned": (lambda: prune.random_unstructured(conv(), "weight", 0.5), "not that of a plain"),
    "hook": (lambda: hooked(conv()), "forward hooks"),
    "patched": (lambda: patched(conv()), "not that of a plain"),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_layers_that_are_more_than_a_convolution(name):
    make, why = LEFT_OUT[name]
    torch.manual_seed(0)
    model = net(make(), conv(), Same(8, 8, 1))
    y = model(X)
    fuse(convert_to_resconv(model, X))
    assert model.resconv_report.converted == ["2", "3"] and why in model.resconv_report.left_out["1"]
    torch.testing.assert_close(model(X), y)


class ActivatedBN(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.silu(super().forward(x))


@pytest.mark.parametrize("bn", [lambda: ActivatedBN(8), lambda: hooked(nn.BatchNorm2d(8)), lambda: nn.GroupNorm(2, 8)])
def test_batch_norms_that_are_more(bn):
    model = net(conv(), bn())
    y = model(X)
    fuse(convert_to_resconv(model, X))
    assert model.resconv_report.converted == ["1"] and not model.resconv_report.batchnorms
    torch.testing.assert_close(model(X), y)


class Wired(nn.Module):
    """`fn(self, stem(x))`, with three convolutions and batch norms to use."""

    def __init__(self, fn):
        super().__init__()
        self.fn = fn
        self.stem = nn.Conv2d(3, 8, 3)
        self.a, self.b, self.c = conv(), conv(), conv()
        self.n, self.m = nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x):
        return self.fn(self, self.stem(x))


WIRINGS = {
    "read twice": (lambda m, x: m.n(y := m.a(x)) + y, {"a": None}),
    "one batch norm twice": (lambda m, x: m.n(m.b(m.n(m.a(x)))), {"a": None, "b": None}),
    "shared": (lambda m, x: m.n(m.b(m.a(m.a(x)))), {"b": "n"}),
    "returned": (lambda m, x: (y := m.a(x), m.n(y)), {"a": None}),
    "functional": (lambda m, x: F.batch_norm(m.a(x), m.n.running_mean, m.n.running_var), {"a": None}),
    "between": (lambda m, x: m.n(m.a(x).relu()), {"a": None}),
    "size asked": (lambda m, x: m.n(y := m.a(x)) * y.shape[1], {"a": "n"}),
    "crossed": (lambda m, x: m.n(m.b(m.m(m.a(x)))), {"a": "m", "b": "n"}),
    "branch": (lambda m, x: m.a(x) if x.sum() > 1e9 else m.n(m.b(x)), {"b": "n"}),
    "in place": (lambda m, x: F.relu_(m.n(m.a(F.relu_(x)))).add_(x), {"a": "n"}),
}


@pytest.mark.parametrize("name", WIRINGS)
def test_wirings(name):
    torch.manual_seed(0)
    fn, expected = WIRINGS[name]
    model = Wired(fn)
    randomise_batchnorm(model, X)
    y = model(X)
    convert_to_resconv(model, X)
    report = model.resconv_report
    assert {n: report.batchnorms.get(n) for n in report.converted} == expected
    again = model(X)
    torch.testing.assert_close(again, y, rtol=0, atol=0)
    torch.testing.assert_close(fuse(model)(X), y)


def test_shared_weights():
    model = net(conv(), conv(), conv())
    model[2].weight = model[1].weight
    convert_to_resconv(model, X)
    assert model.resconv_report.converted == ["3"]
    assert model.resconv_report.left_out["1"] == "shares its weights with another layer"


def test_one_module_under_two_names():
    model = Wired(lambda m, x: m.second(m.n(m.a(x))))
    model.second, model.bn = model.b, model.n
    y = model.eval()(X)
    convert_to_resconv(model, X)
    assert model.second is model.b and type(model.bn) is type(model.n) is nn.Identity
    fuse(model)
    assert model.second is model.b and type(model.b) is nn.Conv2d
    torch.testing.assert_close(model(X), y)


def test_layers_kept_in_a_list():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.one, self.bn = nn.Conv2d(3, 8, 3), conv(), nn.BatchNorm2d(8)
            self.order = [self.stem, self.one, self.bn]

        def forward(self, x):
            for layer in self.order:
                x = layer(x)
            return x

    model = Listed().train()
    before = {n: m for n, m in model.named_modules()}
    with pytest.raises(ValueError, match="still calls the old layer one"):
        convert_to_resconv(model, X)
    assert dict(model.named_modules()) == before and model.training and not hasattr(model, "resconv_report")


def test_ignored_layers():
    model = net(conv(), conv(), nn.Sequential(conv()), conv(5), nn.BatchNorm2d(8))
    convert_to_resconv(model, X, ignored_layers=[model[1], model[2].weight, model[3], model[5]])
    assert model.resconv_report.converted == ["4"] and not model.resconv_report.batchnorms
    assert {model.resconv_report.left_out[n] for n in ("1", "2", "3.0")} == {"is in ignored_layers"}
    with pytest.raises(TypeError, match="ignored_layers"):
        convert_to_resconv(plain(), X, ignored_layers=["1"])


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.joint = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), conv()

    def forward(self, left, right=None):
        return {"y": self.joint(self.left(left) + self.right(right))}


@pytest.mark.parametrize("inputs", [(X, X + 1), {"left": X, "right": X + 1}], ids=["tuple", "dict"])
def test_several_inputs(inputs):
    model = convert_to_resconv(TwoInputs(), inputs)
    assert list(resconv_layers(model)) == ["joint"]
    model = convert_to_resconv(TwoInputs(), X, forward_fn=lambda m, x: m(x, right=x))
    assert list(resconv_layers(model)) == ["joint"]
    with pytest.raises(TypeError, match="example_inputs"):
        convert_to_resconv(TwoInputs(), 3)


def test_wrapped_by_data_parallel():
    model = nn.DataParallel(plain())
    for use in (lambda: convert_to_resconv(model, X), lambda: fuse(model)):
        with pytest.raises(TypeError, match=r"wrapped in DataParallel.*give model\.module"):
            use()
    assert convert_to_resconv(model.module, X).resconv_report.converted == ["1", "4"]
    assert type(fuse(model.module)[1]) is nn.Conv2d


# --- errors: the model is as before -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"a": -0.1}, "a=-0.1"),
        ({"a": float("nan")}, "a=nan"),
        ({"a": float("inf")}, "a=inf"),
        ({"s": float("nan")}, "s"),
    ],
)
def test_bad_scalars(options, why):
    model = plain()
    with pytest.raises(ValueError, match=why):
        convert_to_resconv(model, X, **options)
    assert not resconv_layers(model)


def test_nothing_to_do():
    for model in (net(), nn.Conv2d(3, 3, 1), nn.Sequential(nn.Flatten(), nn.Linear(192, 2))):
        with pytest.raises(ValueError, match="no convolution that could take a shortcut"):
            convert_to_resconv(model, X)
    with pytest.raises(ValueError, match="no ResConv2d to fuse"):
        fuse(plain())
    model = convert_to_resconv(plain(), X)
    with pytest.raises(ValueError, match="converted before"):
        convert_to_resconv(model, X)
    assert convert_to_resconv(fuse(model.eval()), X).resconv_report.converted == ["1", "4"]  # fused ones, anew


def test_fusing_in_train_mode():
    model = convert_to_resconv(net(conv(), conv(), nn.BatchNorm2d(8)), X)
    model.eval()[2].bn.train()
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=r"layer 2 cannot be fused.*call model.eval\(\)"):
        fuse(model)
    assert dict(model.named_modules()) == before
    frozen = convert_to_resconv(net(conv(), FrozenBatchNorm2d(8)), X).train()  # frozen: its mode says nothing
    y = frozen[1](torch.ones(1, 8, 4, 4))
    torch.testing.assert_close(fuse(frozen)[1](torch.ones(1, 8, 4, 4)), y)
    assert frozen[1].training


def test_fused_layers_keep_requires_grad_and_draw_nothing():
    model = plain()
    state = torch.get_rng_state()
    convert_to_resconv(model, X)
    model[1].conv.weight.requires_grad_(False)
    fuse(model)
    assert [p.requires_grad for p in (*model[1].parameters(), *model[4].parameters())] == [False, False, True, True]
    assert torch.equal(torch.get_rng_state(), state)
