r"""Networks as ITPruner's public code counts them (arXiv 2108.08532, repository MAC-AutoML/ITPruner).

A network is a list of charges. A charge belongs to at most two channel groups, so with the kept fractions x

.. math:: F(x) = \sum_g a_g x_g + \sum_{g \le h} D_{gh}\, x_g x_h

What the authors' code charges, quirks included; operations of fixed cost are left out:

====================  =======================================================================================
all                   one FLOP per multiply-accumulate of a convolution; 2 per weight for what reads the last
                      group into a fixed width, except in MobileNetV2, which leaves its classifier out
VGG-16                4 per element for batch norm, 1 for ReLU, 2 per output element of max pooling, 3 of average
                      pooling, and once more 4 for a 1-d batch norm that the network does not have
ResNet-20/56          8 per element of a block (two batch norms); no ReLU; the stem stays 16 wide and is free; a
                      1×1 shortcut, not there when dense, where the stage changes. Both convolutions of a block share
                      one width, and a shortcut ties nothing: a pruned block with unequal widths gets a 1×1 conv
MobileNetV1/V2        convolutions only. V2: an expansion is six times the width it reads, blocks of a stage share one
ResNet-50             5 per element for batch norm and ReLU, after every convolution (shortcuts too); 9 per output
                      element of max pooling; the classifier's bias in proportion to the last group. The first 1×1
                      convolution of each stage is charged at twice the side of that stage, which is right for
                      stages 2–4 and four times too much for stage 1
====================  =======================================================================================

The importance of a group was not always measured on its own features: see :attr:`OfficialNetwork.features`.
Written afresh from the cost convention; the repository has no licence and nothing of it is copied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["NETWORKS", "Charge", "OfficialNetwork", "mobilenet_v1", "mobilenet_v2", "resnet50", "resnet_cifar", "vgg16"]


@dataclass(frozen=True)
class Charge:
    """What one operation costs in the authors' convention.

    Attributes:
        name: the operation.
        groups: the group or the two groups whose kept fractions multiply the cost; the same group twice is a square.
        flops: cost with all channels kept.
    """

    name: str
    groups: tuple[int, ...]
    flops: int


@dataclass(frozen=True)
class OfficialNetwork:
    """A network of L channel groups as the authors describe it.

    Attributes:
        name: key in :data:`NETWORKS`.
        groups: what is narrowed, L names.
        widths: dense channels, L.
        features: the tensor on which the code measures the importance of the group at the same position, L names;
            (n, C, H, W) flattened to (n, C·H·W). In MobileNetV1 and V2 this is one layer further than the group.
        charges: every operation whose cost depends on a group.
    """

    name: str
    groups: tuple[str, ...]
    widths: tuple[int, ...]
    features: tuple[str, ...]
    charges: tuple[Charge, ...]

    def form(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Coefficients of F: a of shape (L,), and D of shape (L, L), upper triangular.

        Example:
            >>> a, D = vgg16().form()
            >>> float(a.sum() + D.sum())
            315168256.0
        """
        linear, quadratic = np.zeros(len(self.widths)), np.zeros((len(self.widths), len(self.widths)))
        for charge in self.charges:
            if len(charge.groups) == 1:
                linear[charge.groups[0]] += charge.flops
            else:
                quadratic[min(charge.groups), max(charge.groups)] += charge.flops
        return linear, quadratic


def vgg16() -> OfficialNetwork:
    """VGG-16 for CIFAR-10: 13 convolutions, classifier C → 512 → 10; 315.17 MFLOPs. Features: after each ReLU."""
    widths = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
    charges, side, last = [], 32, len(widths) - 1
    for g, c in enumerate(widths):
        reads, c_in = ((), 3) if g == 0 else ((g - 1,), widths[g - 1])
        charges.append(Charge(f"conv{g + 1}", (*reads, g), 9 * c_in * c * side**2))
        charges.append(Charge(f"bn{g + 1}, relu{g + 1}", (g,), (4 + 1) * c * side**2))
        if g in (1, 3, 6, 9):
            side //= 2
            charges.append(Charge(f"max pooling after conv{g + 1}", (g,), 2 * c * side**2))
    # average pooling leaves one position
    charges.append(Charge("average pooling", (last,), 3 * widths[last]))
    charges.append(Charge("first linear layer", (last,), 2 * widths[last] * 512))
    charges.append(Charge("1-d batch norm", (last,), 4 * widths[last]))
    names = tuple(f"conv{g + 1}" for g in range(len(widths)))
    return OfficialNetwork("vgg16", names, widths, tuple(f"relu{g + 1}" for g in range(len(widths))), tuple(charges))


def resnet_cifar(depth: int = 20) -> OfficialNetwork:
    """CIFAR-10 ResNet of 6n + 2 layers, one group per block; features: block outputs, after addition and ReLU.

    Args:
        depth: 20 (41.06 MFLOPs), 56 (127.37 MFLOPs), or another 6n + 2.

    Raises:
        ValueError: for a depth that is not 6n + 2.
    """
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"depth={depth} is not 6n + 2; use 20, 32, 44, 56 or 110")
    n = (depth - 2) // 6
    widths = (16,) * n + (32,) * n + (64,) * n
    names = tuple(f"layer{g // n + 1}.{g % n}" for g in range(3 * n))
    charges = []
    for g, c in enumerate(widths):
        side = 32 // 2 ** (g // n)
        reads, c_in = ((), 16) if g == 0 else ((g - 1,), widths[g - 1])
        charges.append(Charge(f"{names[g]}.conv1", (*reads, g), 9 * c_in * c * side**2))
        charges.append(Charge(f"{names[g]}.conv2", (g, g), 9 * c * c * side**2))
        charges.append(Charge(f"{names[g]}.bn1, bn2", (g,), 2 * 4 * c * side**2))
        if c_in != c:
            charges.append(Charge(f"{names[g]}.shortcut", (g - 1, g), c_in * c * side**2))
    charges.append(Charge("linear", (len(widths) - 1,), 2 * widths[-1] * 10))
    return OfficialNetwork(f"resnet{depth}", names, widths, tuple(f"{x} output" for x in names), tuple(charges))


def mobilenet_v1() -> OfficialNetwork:
    """MobileNetV1 for ImageNet: stem and 13 depthwise-separable blocks; 569.76 MFLOPs.

    Group 0 is the stem, group g the output of block g. The features start with block 1 and end with the logits, so
    every importance is that of the next group's features.
    """
    widths = (32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
    side = 112
    charges = [Charge("stem", (0,), 27 * widths[0] * side**2)]
    for g in range(1, len(widths)):
        if g in (2, 4, 6, 12):
            side //= 2
        charges.append(Charge(f"block{g}.depthwise", (g - 1,), 9 * widths[g - 1] * side**2))
        charges.append(Charge(f"block{g}.pointwise", (g - 1, g), widths[g - 1] * widths[g] * side**2))
    charges.append(Charge("linear", (len(widths) - 1,), 2 * widths[-1] * 1000))
    blocks = tuple(f"block{g}" for g in range(1, len(widths)))
    features = (*(f"{x} output (after ReLU)" for x in blocks), "logits")
    return OfficialNetwork("mobilenet_v1", ("stem", *blocks), widths, features, tuple(charges))


def mobilenet_v2() -> OfficialNetwork:
    """MobileNetV2 for ImageNet: stem and 7 stages of inverted residuals; 299.49 MFLOPs.

    Group 0 is the stem, group g the output of stage g. The features start with stage 1 and end with the last 1×1
    convolution (1280 channels, after ReLU6), so every importance is that of the next group's features.
    """
    widths = (32, 16, 24, 32, 64, 96, 160, 320)
    stages = ((1, 1, 1), (6, 2, 2), (6, 3, 2), (6, 4, 2), (6, 3, 1), (6, 3, 2), (6, 1, 1))  # expansion, blocks, stride
    side, index = 112, 0
    charges, features = [Charge("stem", (0,), 27 * widths[0] * side**2)], []
    for g, (expansion, blocks, stride) in enumerate(stages, start=1):
        for block in range(blocks):
            index += 1
            source = g if block else g - 1
            c_in, hidden = widths[source], expansion * widths[source]
            if expansion > 1:
                charges.append(Charge(f"features.{index}.expand", (source, source), c_in * hidden * side**2))
            side //= 1 if block else stride
            charges.append(Charge(f"features.{index}.depthwise", (source,), 9 * hidden * side**2))
            charges.append(Charge(f"features.{index}.project", (source, g), hidden * widths[g] * side**2))
        features.append(f"features.{index} output (block {index}, no activation)")
    charges.append(Charge("features.18", (len(widths) - 1,), widths[-1] * 1280 * side**2))
    groups = ("stem", *(f"stage{g}" for g in range(1, len(widths))))
    features.append("features.18 output (last 1x1 convolution, after ReLU6)")
    return OfficialNetwork("mobilenet_v2", groups, widths, tuple(features), tuple(charges))


def resnet50() -> OfficialNetwork:
    """ResNet-50 for ImageNet: 37 groups, 4187.08 MFLOPs.

    Groups: the stem, then per stage conv1 and conv2 of block 0, the stage's output (shared by all its blocks), and
    conv1 and conv2 of the other blocks. Features: after ReLU; a stage's output is measured on block 0.
    """
    blocks, planes = (3, 4, 6, 3), (64, 128, 256, 512)
    groups, features, widths = ["stem"], ["stem (after ReLU, before max pooling)"], [64]
    charges = [Charge("stem", (0,), 3 * 49 * 64 * 112**2), Charge("stem.bn, relu", (0,), 5 * 64 * 112**2)]
    charges.append(Charge("max pooling", (0,), 9 * 64 * 56**2))

    def conv(name: str, read: int, written: int, taps: int, side: int) -> None:
        charges.append(Charge(name, (read, written), taps * widths[read] * widths[written] * side**2))
        charges.append(Charge(f"{name}.bn, relu", (written,), 5 * widths[written] * side**2))

    source = 0
    for stage, (n, c) in enumerate(zip(blocks, planes, strict=True)):
        name, side, first = f"layer{stage + 1}", 56 // 2**stage, len(widths)
        output = first + 2
        for block in range(n):
            inner = [f"{name}.{block}.conv1", f"{name}.{block}.conv2"]
            groups += [*inner, f"{name} output"] if block == 0 else inner
            features += [f"{x} (after ReLU)" for x in inner] + ([f"{name}.0 output (after ReLU)"] if block == 0 else [])
            widths += [c, c, 4 * c] if block == 0 else [c, c]
            if block == 0:
                conv(f"{name}.0.downsample", source, output, 1, side)
            conv1 = first if block == 0 else first + 1 + 2 * block
            conv(inner[0], source, conv1, 1, side if block else 2 * side)
            conv(inner[1], conv1, conv1 + 1, 9, side)
            conv(f"{name}.{block}.conv3", conv1 + 1, output, 1, side)
            source = output
    charges.append(Charge("linear", (len(widths) - 1,), (2 * widths[-1] + 1) * 1000))
    return OfficialNetwork("resnet50", tuple(groups), tuple(widths), tuple(features), tuple(charges))


NETWORKS: dict[str, Callable[[], OfficialNetwork]] = {
    "vgg16": vgg16,
    "resnet20": resnet_cifar,
    "resnet56": lambda: resnet_cifar(56),
    "mobilenet_v1": mobilenet_v1,
    "mobilenet_v2": mobilenet_v2,
    "resnet50": resnet50,
}
"""Networks with published configurations."""
