"""Which convolutions are converted, and errors that leave the model as it was."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from torchvision.ops import FrozenBatchNorm2d

from helpers.resconv_block_cases import X, conv, net, plain
from tp_importance import Budget
from tp_importance.methods.resconv import ResConvPruner, convert_to_resconv, fuse, resconv_layers
from tp_importance.testing.networks import randomise_batchnorm

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
    with pytest.raises(ValueError, match="in ignored_layers is not in"):  # it would not be kept
        convert_to_resconv(plain(), X, ignored_layers=[plain()[1]])


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


def pruned(model, x):
    return ResConvPruner(model, x, [(x, torch.arange(len(x)))], budget=Budget(macs=0.5))


class Transposed(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


@pytest.mark.parametrize("convert", [convert_to_resconv, pruned])
def test_not_applicable_to_a_transformer(convert):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(2), Transposed(), layer, nn.Flatten(), nn.LazyLinear(2))
    model(X)
    why = r"ResConv is not applicable to Sequential.*\(0: reads the network's input\).*never linear layers or attention"
    with pytest.raises(ValueError, match=why):
        convert(model, X)


def test_nothing_to_do():
    for model in (net(), nn.Conv2d(3, 3, 1), nn.Sequential(nn.Flatten(), nn.Linear(192, 2))):
        with pytest.raises(ValueError, match="no convolution that could take a shortcut"):
            convert_to_resconv(model, X)
        assert not resconv_layers(model)
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
