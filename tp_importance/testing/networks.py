"""Small networks for the contracts: each shows one way in which layers share channels.

>>> model, example_inputs = make_network("residual")
>>> example_inputs.shape, model(example_inputs).shape
(torch.Size([2, 3, 16, 16]), torch.Size([2, 4]))
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["MISTRACED", "NUM_CLASSES", "TOPOLOGIES", "make_network"]

NUM_CLASSES = 4
"""Every network ends in this many scores."""


def conv_bn(c_in: int, c_out: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution and its batch norm."""
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out))


def conv_bn_relu(c_in: int, c_out: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution, its batch norm and ReLU."""
    return conv_bn(c_in, c_out, kernel, stride, groups).append(nn.ReLU())


def head(channels: int) -> nn.Sequential:
    """Global average pooling and a classifier."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, NUM_CLASSES))


def plain() -> nn.Module:
    """A chain of three convolutions."""
    return nn.Sequential(conv_bn_relu(3, 8), conv_bn_relu(8, 12, stride=2), conv_bn_relu(12, 16), head(16))


class Residual(nn.Module):
    """`relu(body(x) + shortcut(x))`."""

    def __init__(self, c_in: int, c_mid: int, c_out: int, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_bn_relu(c_in, c_mid, stride=stride), conv_bn(c_mid, c_out))
        same = c_in == c_out and stride == 1
        self.shortcut = nn.Identity() if same else conv_bn(c_in, c_out, kernel=1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """The body and the shortcut, added."""
        return F.relu(self.body(x) + self.shortcut(x))


def residual() -> nn.Module:
    """Two residual blocks, with an identity and with a convolution as shortcut."""
    return nn.Sequential(conv_bn_relu(3, 8), Residual(8, 12, 8), Residual(8, 16, 24, stride=2), head(24))


class Concat(nn.Module):
    """Two branches, one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn_relu(3, 8)
        self.left = conv_bn_relu(8, 12)
        self.right = conv_bn_relu(8, 16, kernel=1)
        self.tail = nn.Sequential(conv_bn_relu(28, 24, stride=2), head(24))

    def forward(self, x: Tensor) -> Tensor:
        """The branches, appended to one another."""
        x = self.stem(x)
        return self.tail(torch.cat([self.left(x), self.right(x)], dim=1))


class DenseLayer(nn.Module):
    """BN-ReLU-conv; appends its output to its input."""

    def __init__(self, c_in: int, growth: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(c_in)
        self.conv = nn.Conv2d(c_in, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The input with the new features behind it."""
        return torch.cat([x, self.conv(F.relu(self.bn(x)))], dim=1)


def dense() -> nn.Module:
    """A DenseNet of three layers."""
    layers = [DenseLayer(12 + 8 * i, 8) for i in range(3)]
    return nn.Sequential(nn.Conv2d(3, 12, 3, padding=1, bias=False), *layers, nn.BatchNorm2d(36), nn.ReLU(), head(36))


class MBConv(nn.Module):
    """Inverted residual of MobileNet-v2: expand, depthwise, project."""

    def __init__(self, c_in: int, c_mid: int, c_out: int, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *conv_bn(c_in, c_mid, kernel=1),
            nn.ReLU6(),
            *conv_bn(c_mid, c_mid, stride=stride, groups=c_mid),
            nn.ReLU6(),
            *conv_bn(c_mid, c_out, kernel=1),
        )
        self.skip = c_in == c_out and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        """The body, and the input if the shapes agree."""
        return x + self.body(x) if self.skip else self.body(x)


def depthwise() -> nn.Module:
    """Two inverted residuals of MobileNet-v2."""
    return nn.Sequential(conv_bn_relu(3, 8), MBConv(8, 24, 8), MBConv(8, 32, 16, stride=2), head(16))


class GroupedBottleneck(nn.Module):
    """Bottleneck of ResNeXt."""

    def __init__(self, channels: int, c_mid: int, groups: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv_bn_relu(channels, c_mid, kernel=1),
            conv_bn_relu(c_mid, c_mid, groups=groups),
            conv_bn(c_mid, channels, kernel=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """The input and the body, added."""
        return F.relu(x + self.body(x))


def grouped() -> nn.Module:
    """A bottleneck of ResNeXt: four groups of channels lose the same number."""
    return nn.Sequential(conv_bn_relu(3, 12), GroupedBottleneck(12, 16, 4), conv_bn_relu(12, 24, stride=2), head(24))


class Split(nn.Module):
    """One tensor cut in two; the consumers' widths say where, so that the cut follows pruning.

    Torch-Pruning 1.6.1 meets the consumers walking back from the output, last operand first, and hands them the pieces
    in that order. Right with the right half in front; otherwise it gives each consumer the other's channels.
    """

    def __init__(self, c_left: int, c_right: int, right_first: bool) -> None:
        super().__init__()
        self.right_first = right_first
        self.stem = conv_bn_relu(3, c_left + c_right)
        self.left = conv_bn_relu(c_left, 16)
        self.right = conv_bn_relu(c_right, 24)
        self.head = head(40)

    def forward(self, x: Tensor) -> Tensor:
        """The halves, each through a layer of its own."""
        left, right = self.stem(x).split([self.left[0].in_channels, self.right[0].in_channels], dim=1)
        halves = [self.left(left), self.right(right)]
        return self.head(torch.cat(halves[::-1] if self.right_first else halves, dim=1))


def flatten() -> nn.Module:
    """Feature maps flattened into a linear layer: a channel is sixteen features."""
    convs = [conv_bn_relu(3, 8, stride=2), conv_bn_relu(8, 12, stride=2)]
    return nn.Sequential(*convs, nn.Flatten(), nn.Linear(12 * 4 * 4, 24), nn.ReLU(), nn.Linear(24, NUM_CLASSES))


class SqueezeExcite(nn.Module):
    """Scales each channel by a gate computed from all of them."""

    def __init__(self, channels: int, c_squeeze: int, gate: nn.Module) -> None:
        super().__init__()
        squeeze = [nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, c_squeeze, 1), nn.ReLU()]
        self.gate = nn.Sequential(*squeeze, nn.Conv2d(c_squeeze, channels, 1), gate)

    def forward(self, x: Tensor) -> Tensor:
        """The input, gated."""
        return x * self.gate(x)


def se() -> nn.Module:
    """Two squeeze-and-excitation gates."""
    return nn.Sequential(
        conv_bn_relu(3, 12),
        SqueezeExcite(12, 6, nn.Sigmoid()),
        conv_bn_relu(12, 16, stride=2),
        SqueezeExcite(16, 8, nn.Hardsigmoid()),
        head(16),
    )


class SharedInput(nn.Module):
    """One tensor read by three convolutions; two of them are added, the third is appended."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn_relu(3, 12)
        self.a = conv_bn_relu(12, 16)
        self.b = conv_bn_relu(12, 16, kernel=1)
        self.c = conv_bn_relu(12, 8)
        self.head = head(24)

    def forward(self, x: Tensor) -> Tensor:
        """Sum of two consumers, and the third behind it."""
        x = self.stem(x)
        return self.head(torch.cat([self.a(x) + self.b(x), self.c(x)], dim=1))


class Transposed(nn.Module):
    """U-Net with one level: down, up by a transposed convolution, concatenate with the skip."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = conv_bn_relu(3, 8)
        self.bottom = conv_bn_relu(8, 24, stride=2)
        self.up = nn.Sequential(nn.ConvTranspose2d(24, 12, 2, stride=2, bias=False), nn.BatchNorm2d(12), nn.ReLU())
        self.tail = nn.Sequential(conv_bn_relu(20, 16), head(16))

    def forward(self, x: Tensor) -> Tensor:
        """The skip and what comes up again."""
        x = self.encoder(x)
        return self.tail(torch.cat([x, self.up(self.bottom(x))], dim=1))


class MLPBlock(nn.Module):
    """The MLP half of a transformer block. Tokens see each other through their mean, without attention."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        """Mix the tokens, then the MLP."""
        x = x + x.mean(dim=1, keepdim=True)
        return x + self.mlp(x)


class TransformerMLP(nn.Module):
    """Tokens `(B, 6, 32)` → embedding → two blocks → mean over tokens → classes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(32, 24)
        self.blocks = nn.Sequential(MLPBlock(24, 40), MLPBlock(24, 48))
        self.head = nn.Linear(24, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the classes, shape (B, classes)."""
        return self.head(self.blocks(self.embed(x)).mean(dim=1))


class PaddedResidual(nn.Module):
    """Shortcut "A" of the CIFAR ResNets: subsample, pad with zero channels on both sides.

    Torch-Pruning takes the padding for an elementwise operation: what it removes past the pad belongs to other
    channels, yet the result runs.
    """

    def __init__(self, c_in: int, c_out: int, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_bn_relu(c_in, c_out, stride=stride), conv_bn(c_out, c_out))
        self.pad = (c_out - c_in) // 2
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """The body and the padded input, added."""
        shortcut = x[:, :, :: self.stride, :: self.stride]
        if self.pad:
            shortcut = F.pad(shortcut, (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(self.body(x) + shortcut)


class PaddedShortcut(nn.Module):
    """A CIFAR ResNet with padded shortcuts."""

    def __init__(self) -> None:
        super().__init__()
        stages = [PaddedResidual(8, 8), PaddedResidual(8, 12, stride=2), PaddedResidual(12, 16, stride=2)]
        self.features = nn.Sequential(conv_bn_relu(3, 8), *stages)
        self.fc = nn.Linear(16, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the classes, shape (B, classes)."""
        return self.fc(self.features(x).mean(dim=(2, 3)))  # behind `head` the wrong widths would not fit


def no_bn() -> nn.Module:
    """Convolutions with biases, without batch norm."""
    convs = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*convs, nn.Conv2d(12, 16, 3), nn.ReLU(), head(16))


class PreactResidual(nn.Module):
    """BN-ReLU before each convolution; nothing after the addition."""

    def __init__(self, c_in: int, c_mid: int, c_out: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = nn.Conv2d(c_in, c_mid, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_mid)
        self.conv2 = nn.Conv2d(c_mid, c_out, 3, padding=1, bias=False)
        same = c_in == c_out and stride == 1
        self.shortcut = None if same else nn.Conv2d(c_in, c_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Norm and ReLU first, then the convolution; the sum is handed on as it is."""
        h = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(h)
        return shortcut + self.conv2(F.relu(self.bn2(self.conv1(h))))


def preact() -> nn.Module:
    """Two blocks of a pre-activation ResNet."""
    stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
    blocks = [PreactResidual(8, 12, 8), PreactResidual(8, 16, 24, stride=2)]
    return nn.Sequential(stem, *blocks, nn.BatchNorm2d(24), nn.ReLU(), head(24))


TOPOLOGIES: dict[str, Callable[[], nn.Module]] = {
    "plain": plain,
    "residual": residual,
    "concat": Concat,
    "dense": dense,
    "depthwise": depthwise,
    "grouped": grouped,
    "split": partial(Split, 8, 12, right_first=True),
    "split_swapped": partial(Split, 10, 10, right_first=False),
    "flatten": flatten,
    "se": se,
    "shared_input": SharedInput,
    "transposed": Transposed,
    "transformer_mlp": TransformerMLP,
    "padded_shortcut": PaddedShortcut,
    "no_bn": no_bn,
    "preact": preact,
}
"""What builds each network."""

MISTRACED = frozenset({"padded_shortcut", "split_swapped"})
"""In the first group of these, Torch-Pruning removes the wrong channels without an error."""


def make_network(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """One of :data:`TOPOLOGIES` in eval mode, and a batch of two inputs.

    Args:
        name: key of :data:`TOPOLOGIES`.
        seed: of weights, batch norms and inputs; the global generator is left alone.

    Returns:
        The network, and inputs of shape (2, 3, 16, 16), for ``"transformer_mlp"`` (2, 6, 32).
    """
    shape = (6, 32) if name == "transformer_mlp" else (3, 16, 16)
    return prepare(TOPOLOGIES[name], shape, seed)


def prepare(build: Callable[[], nn.Module], shape: tuple[int, ...], seed: int) -> tuple[nn.Module, Tensor]:
    """A network in eval mode, initialised and with batch norms set by `seed`; a batch of two inputs of this shape."""
    with torch.random.fork_rng(devices=[]):  # initialisers draw from the global generator: leave it as it was
        torch.manual_seed(seed)
        model = build()
    example_inputs = torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed))
    randomise_batchnorm(model, example_inputs, seed)
    return model.eval(), example_inputs


@torch.no_grad()
def randomise_batchnorm(model: nn.Module, example_inputs: Tensor, seed: int = 0) -> None:
    """Make every BN a non-trivial map: fresh layers scale by 1 and shift by 0, which hides mistakes.

    |γ| ~ U(0.5, 1.5) with one sign in four negative, β ~ N(0, 0.3²), running statistics of one random batch. The model
    ends up in eval mode.
    """
    generator = torch.Generator().manual_seed(seed)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    model.eval()  # only the BNs train: dropout must not disturb their statistics
    momenta = [bn.momentum for bn in norms]
    for bn in norms:
        signs = torch.where(torch.rand(bn.num_features, generator=generator) < 0.25, -1.0, 1.0)
        if bn.affine:
            bn.weight.copy_(signs * (0.5 + torch.rand(bn.num_features, generator=generator)))
            bn.bias.copy_(0.3 * torch.randn(bn.num_features, generator=generator))
        bn.momentum = 1.0  # keep this batch only
        bn.train()
    batch = torch.randn(32, *example_inputs.shape[1:], generator=generator)
    model(batch.to(example_inputs))
    for bn, momentum in zip(norms, momenta, strict=True):
        bn.momentum = momentum
    model.eval()
