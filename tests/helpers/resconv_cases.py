"""Networks around layers that are removed, and the comparison with s = 0."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from tp_importance import Budget
from tp_importance.methods.resconv import ResConvPruner, Scale, convert_to_resconv, fuse, remove_layers, resconv_layers
from tp_importance.testing import class_loader
from tp_importance.testing.networks import conv_bn, conv_bn_relu, head, randomise_batchnorm

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
X32 = X.float()
LOADER = class_loader(n=16, shape=(3, 8, 8), batch_size=8)


class Wired(nn.Module):
    """`fn(self, stem(x))`; convolutions, batch norms and the like come from outside.

    Behind a `fixed` stem no factor can go back; with ReLU its batch norm may take it.
    """

    def __init__(self, fn, modules, fixed):
        super().__init__()
        self.fn, self.stem = fn, conv_bn(3, 8).append(nn.ReLU6() if fixed else nn.ReLU())
        for name, make in modules.items():
            self.add_module(name, make())

    def forward(self, x):
        return self.fn(self, self.stem(x))


def conv(c_in: int = 8, c_out: int = 8, **options) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, padding=1, **options)


def cb() -> nn.Sequential:
    return conv_bn(8, 8)


def cbr() -> nn.Sequential:
    return conv_bn_relu(8, 8)


class Basic(nn.Module):
    """relu(x + bn2(conv2(relu(bn1(conv1(x))))))."""

    def __init__(self, relu: bool = True):
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.bn2 = conv(), nn.BatchNorm2d(8), conv(bias=False), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True) if relu else F.relu

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x
        return self.relu(y)


class Preact(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn1, self.conv1, self.bn2, self.conv2 = nn.BatchNorm2d(8), conv(), nn.BatchNorm2d(8), conv()

    def forward(self, x):
        return x + self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))


class SE(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)

    def forward(self, x):
        return x * self.up(self.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class Partial(nn.Module):
    """FasterNet's partial convolution: half of the channels, in place."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        x = x.clone()
        x[:, :4] = self.conv(x[:, :4])
        return x


def ready(model: nn.Module, a: tuple[float, float] = (0.2, 2.0), seed: int = 0) -> nn.Module:
    """Converted, with random batch norms, s and a; in float64."""
    model.double()
    randomise_batchnorm(model, X.float().double(), seed)
    convert_to_resconv(model, X)
    generator = torch.Generator().manual_seed(seed)
    for layer in resconv_layers(model).values():
        layer.a.data.uniform_(*a, generator=generator)
        layer.s.data.uniform_(-1, 1, generator=generator)
    return model


def masked(model: nn.Module, names: list[str]) -> nn.Module:
    twin = copy.deepcopy(model)
    for name in names:
        twin.get_submodule(name).s.data.zero_()
    return twin


def check(model: nn.Module, names: list[str], *, kept: int | None = None, x: Tensor = X):
    """Remove, compare with s = 0, in eval mode and fused; returns model and report."""
    expected = masked(model, names)(x)
    scale = expected.abs().max()
    report = remove_layers(model, x, names)
    assert report.removed == names and not set(names) & set(resconv_layers(model))
    assert (model(x) - expected).abs().max() <= 1e-9 * scale
    assert kept is None or len(report.kept_scales) == kept, report
    found = {n: m.factor.item() for n, m in model.named_modules() if isinstance(m, Scale) and m.factor != 1}
    assert found == pytest.approx(report.kept_scales)
    if resconv_layers(model):
        fuse(model)
        assert (model(x) - expected).abs().max() <= 1e-9 * scale
    return model, report


R = F.relu
ONE, TWO = {"a": cb}, {"a": cb, "b": cb}
HEAD, LINEAR = {"h": lambda: head(8)}, {"f": lambda: nn.Linear(8, 4)}
PREACT = {"p": Preact, "q": Preact, "n": lambda: nn.BatchNorm2d(8)}
CASES = {
    # name: (function of stem's output, modules, layers to remove (* = all), explicit scales that stay)
    "chain": (lambda m, x: m.h(R(m.b(R(m.a(x))))), TWO | HEAD, "a.0", 0),
    "chain, both": (lambda m, x: m.h(R(m.b(R(m.a(x))))), TWO | HEAD, "*", 0),
    "chain, last": (lambda m, x: m.h(R(m.b(R(m.a(x))))), TWO | HEAD, "b.0", 0),
    "no activation": (lambda m, x: m.h(m.a(x)), ONE | HEAD, "*", 0),
    "modules": (lambda m, x: m.n(x), {"n": lambda: nn.Sequential(cbr(), cbr(), cbr(), head(8))}, "n.1.0", 0),
    "leaky": (lambda m, x: m.h(F.leaky_relu(m.a(F.leaky_relu(m.b(x))))), TWO | HEAD, "*", 0),
    "pools": (
        lambda m, x: m.h(F.avg_pool2d(F.max_pool2d(R(m.a(x)), 3, 2, 1), 3, 1, 1)),
        ONE | HEAD,
        "*",
        0,
    ),
    "flatten": (lambda m, x: m.f(R(m.a(x)).flatten(1)), ONE | {"f": lambda: nn.Linear(512, 4)}, "*", 0),
    "dropout": (lambda m, x: m.f(F.dropout(R(m.a(x)).mean((2, 3)), 0.5, m.training)), ONE | LINEAR, "*", 0),
    "in place": (lambda m, x: m.h(F.relu_(m.b(F.relu_(m.a(x))))), TWO | HEAD, "*", 0),
    "shared ReLU": (
        lambda m, x: m.h(m.r(m.b(m.r(m.a(x))))),
        TWO | {"r": lambda: nn.ReLU(inplace=True)} | HEAD,
        "a.0",
        0,
    ),
    "signed input": (lambda m, x: m.h(R(m.a(x - x.mean()))), ONE | HEAD, "*", 0),
    "two consumers": (lambda m, x: m.h(m.b(y := R(m.a(x))) + m.c(y)), TWO | {"c": conv} | HEAD, "a.0", 0),
    "transposed": (lambda m, x: m.t(R(m.a(x))), ONE | {"t": lambda: nn.ConvTranspose2d(8, 4, 2, 2, groups=2)}, "*", 0),
    "depthwise consumer": (lambda m, x: m.d(R(m.a(x))), ONE | {"d": lambda: conv(8, 16, groups=8)}, "a.0", 0),
    "numbers": (lambda m, x: m.h(2 * R(m.a(x)) / 3), ONE | HEAD, "*", 0),
    # concatenations: every consumer takes each slice's own factor
    "concat": (lambda m, x: m.c(torch.cat([R(m.a(x)), x, R(m.b(x))], 1)), TWO | {"c": lambda: conv(24, 4)}, "*", 0),
    "concat, BN": (
        lambda m, x: m.n(torch.cat([R(m.a(x)), R(m.b(x)), x], 1)),
        TWO | {"n": lambda: nn.BatchNorm2d(24)},
        "*",
        0,
    ),
    "concat, frozen BN": (
        lambda m, x: m.n(torch.cat([R(m.a(x)), x], 1)),
        ONE | {"n": lambda: FrozenBatchNorm2d(16)},
        "*",
        0,
    ),
    "concat, linear": (
        lambda m, x: m.f(F.max_pool2d(torch.cat([R(m.a(x)), x, R(m.b(x))], 1), 2).flatten(1)),
        TWO | {"f": lambda: nn.Linear(24 * 16, 4)},
        "*",
        0,
    ),
    "concat, mean": (
        lambda m, x: m.f(torch.cat([x, R(m.a(x))], 1).mean((2, 3))),
        ONE | {"f": lambda: nn.Linear(16, 4)},
        "*",
        0,
    ),
    "concat, mean over channels": (  # as many channels as rows: it only looks as if they stayed
        lambda m, x: m.f(F.interpolate(torch.cat([x, R(m.a(x))], 1), 16).mean(1).flatten(1)),
        ONE | {"f": lambda: nn.Linear(256, 4)},
        "*",
        None,
    ),
    "concat, grouped": (
        lambda m, x: m.c(torch.cat([R(m.a(x)), x], 1)),
        ONE | {"c": lambda: conv(16, 4, groups=4)},
        "*",
        0,
    ),
    "concat, unfused": (lambda m, x: m.c(torch.cat([R(m.a(x)), x], 1)), ONE | {"c": lambda: conv(16, 16)}, "a.0", 1),
    "concat of concats": (
        lambda m, x: m.c(torch.cat([y := torch.cat([R(m.a(x)), x], 1), R(m.b(x)), y], 1)),
        TWO | {"c": lambda: conv(40, 4)},
        "*",
        0,
    ),
    # a consumer that keeps its shortcut: a ← r a
    "unfused consumer": (lambda m, x: m.h(R(m.b(R(m.a(x))))), TWO | HEAD, "a.0", 0),
    # nothing can take the factor
    "output": (lambda m, x: R(m.a(x)), ONE, "*", 1),
    "also an output": (lambda m, x: torch.cat([y := R(m.a(x)), m.c(y)], 1), ONE | {"c": conv}, "a.0", 1),
    "ReLU6": (lambda m, x: m.h(F.relu6(m.a(x))), ONE | HEAD, "*", 1),
    "SiLU": (lambda m, x: m.h(F.silu(m.a(x))), ONE | HEAD, "*", 1),
    "sigmoid": (lambda m, x: m.h(m.a(x).sigmoid()), ONE | HEAD, "*", 1),
    "PReLU": (lambda m, x: m.h(m.p(m.a(x))), ONE | {"p": nn.PReLU} | HEAD, "*", 1),
    "plus one": (lambda m, x: m.h(R(m.a(x)) + 1), ONE | HEAD, "*", 1),
    "padded by one": (lambda m, x: m.h(F.pad(R(m.a(x)), (1, 1), value=1.0)), ONE | HEAD, "*", 1),
    "gate": (lambda m, x: m.h(m.s(R(m.a(x)))), ONE | {"s": SE} | HEAD, "*", 1),
    "layer norm": (lambda m, x: m.l(R(m.a(x))), ONE | {"l": lambda: nn.LayerNorm(8)}, "*", 1),
    "non-affine BN": (lambda m, x: m.n(R(m.a(x))), ONE | {"n": lambda: nn.BatchNorm2d(8, affine=False)}, "*", 1),
    "softmax": (lambda m, x: m.h(F.softmax(m.a(x), 1)), ONE | HEAD, "*", 1),
    "value asked": (lambda m, x: m.h(y * 2 if (y := R(m.a(x))).max() > 0.1 else y), ONE | HEAD, "*", 1),
    "called twice": (lambda m, x: m.c(m.c(R(m.a(x)))), ONE | {"c": conv}, "a.0", 1),
    "slice overwritten": (
        lambda m, x: m.h(m.p(x)),
        {"p": lambda: Partial()} | HEAD,
        "p.conv",
        1,
    ),
    "residual, one": (lambda m, x: m.h(m.b(x)), {"b": Basic} | HEAD, "b.conv1", 0),
    "residual, two": (lambda m, x: m.h(m.b(x)), {"b": Basic} | HEAD, "b.conv2", 0),
    "residual, both": (lambda m, x: m.h(m.b(x)), {"b": Basic} | HEAD, "*", 0),
    "residual, functional": (lambda m, x: m.h(m.b(x)), {"b": lambda: Basic(False)} | HEAD, "*", 0),
    "residual of the output": (lambda m, x: m.b(x), {"b": Basic}, "*", 1),
    "preact": (lambda m, x: m.h(m.n(m.q(m.p(x)))), PREACT | HEAD, "p.conv2", 0),
    "preact, first": (lambda m, x: m.h(m.n(m.q(m.p(x)))), PREACT | HEAD, "p.conv1", 0),
    "preact, all": (lambda m, x: m.h(m.n(m.q(m.p(x)))), PREACT | HEAD, "*", 0),
}


def resnet() -> nn.Module:
    """Two stages, with a convolution and with padding (option A) for a shortcut."""
    torch.manual_seed(0)

    class Stage(nn.Module):
        def __init__(self, c_in: int, c_out: int, padded: bool):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(c_in, c_out, 3, 2, 1), nn.BatchNorm2d(c_out)
            self.conv2, self.bn2 = conv(c_out, c_out), nn.BatchNorm2d(c_out)
            self.shortcut = None if padded else conv_bn(c_in, c_out, 1, 2)

        def forward(self, x):
            y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
            if self.shortcut is None:
                return F.relu(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)))
            return F.relu(y + self.shortcut(x))

    return nn.Sequential(conv_bn_relu(3, 8), Basic(), Basic(), Stage(8, 12, True), Stage(12, 16, False), head(16))


def vgg() -> nn.Module:
    torch.manual_seed(0)
    layers = [conv_bn_relu(3, 8), cbr(), nn.MaxPool2d(2), conv_bn_relu(8, 12), conv_bn_relu(12, 12), nn.MaxPool2d(2)]
    layers += [conv(12, 12), nn.ReLU(), conv(12, 12), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(48, 8), nn.ReLU()]
    return nn.Sequential(*layers, nn.Dropout(), nn.Linear(8, 4))


def fresh(budget: Budget | None = None, build=resnet, **options) -> ResConvPruner:
    model = ready(build()).float()
    return ResConvPruner(model, X32, budget=budget or Budget(macs=0.7), **options)


def train(model, optimizer, pruner=None, steps=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 8, 8, generator=generator)).square().mean().backward()
        optimizer.step()
        if pruner is not None:
            pruner.regularize(optimizer)
