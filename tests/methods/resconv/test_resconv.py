"""Residual convolutions: fusing, precisions, copies."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from helpers.resconv_block_cases import X, conv, net, plain
from tp_importance.methods.resconv import ResConv2d, convert_to_resconv, fuse, resconv_layers

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


def test_fused_layers_keep_requires_grad_and_draw_nothing():
    model = plain()
    state = torch.get_rng_state()
    convert_to_resconv(model, X)
    model[1].conv.weight.requires_grad_(False)
    fuse(model)
    assert [p.requires_grad for p in (*model[1].parameters(), *model[4].parameters())] == [False, False, True, True]
    assert torch.equal(torch.get_rng_state(), state)
