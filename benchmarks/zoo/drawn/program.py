"""A program is a list of steps; every list makes a network, so that whatever is left out of it, one is left.

A step is the name of an operation and four small numbers, whose meaning depends on the tensors there are when it is
reached: which tensors it reads, how wide it is. A step that fits none of them does nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.zoo.drawn import functions as f
from benchmarks.zoo.drawn.builder import (
    BATCH_NORM,
    CHANNELS,
    CONV,
    INSTANCE_NORM,
    SIDE,
    TRANSPOSED,
    Attention,
    Builder,
    Drawn,
    Numbers,
    Split,
    Step,
    dims,
    divisors,
    fits,
    is_map,
    pixels,
)
from benchmarks.zoo.scramble import scramble

# -- operations: each takes the builder and four numbers


def in_groups(b: Builder, which: int, choice: int) -> tuple[int, Tensor, int] | None:
    """A map whose channels can be divided into equal groups: its index, the map, and how many groups."""
    i = b.take(which, lambda x: is_map(x) and len(divisors(x.shape[1])) > 1)
    if i is None:
        return None
    groups = divisors(b.values[i].shape[1])[:-1]
    return i, b.values[i], groups[choice % len(groups)]


def conv(b: Builder, n: Numbers) -> None:
    i = b.take(n[0], is_map)
    if i is None:
        return
    x, out, kernel = b.values[i], 2 + n[1], 1 + 2 * (n[2] % 2)
    stride = 2 if n[3] in (5, 6) and min(x.shape[2:]) > 3 else 1
    if fits(out, pixels(x)):
        b.emit(CONV[dims(x)](x.shape[1], out, kernel, stride, kernel // 2, bias=n[3] % 2 == 0), i)


def grouped_conv(b: Builder, n: Numbers) -> None:
    """Groups of several inputs and outputs."""
    found = in_groups(b, n[0], n[2])
    if found is None:
        return
    i, x, g = found
    if fits(g * (2 + n[1] % 3), pixels(x)):
        b.emit(CONV[dims(x)](x.shape[1], g * (2 + n[1] % 3), 1 + 2 * (n[3] % 2), padding=n[3] % 2, groups=g), i)


def depthwise(b: Builder, n: Numbers) -> None:
    """Every input has one filter or, with a multiplier, several."""
    i = b.take(n[0], lambda x: is_map(x) and x.shape[1] > 1)
    if i is None:
        return
    x, times = b.values[i], (1, 1, 2, 3)[n[1] % 4]
    c = x.shape[1]
    if fits(c * times, pixels(x)):
        b.emit(CONV[dims(x)](c, c * times, 3, padding=1, groups=c, bias=n[2] % 2 == 0), i)


def gathering(b: Builder, n: Numbers) -> None:
    """Every filter has several inputs of its own."""
    found = in_groups(b, n[0], n[1])
    if found is None:
        return
    i, x, g = found
    b.emit(CONV[dims(x)](x.shape[1], g, 3, padding=1, groups=g), i)


def transposed(b: Builder, n: Numbers) -> None:
    i = b.take(n[0], is_map)
    if i is None:
        return
    x = b.values[i]
    c, stride = x.shape[1], 1 + n[3] % 2
    choices = [1, *divisors(c)]
    g = choices[(0, 0, 0, 1, -1)[n[2] % 5] % len(choices)]
    out = g * (1 + n[1] % 4) if g > 1 else 2 + n[1]
    if fits(out, pixels(x) * stride ** dims(x)):
        b.emit(TRANSPOSED[dims(x)](c, out, stride, stride, groups=g, bias=n[2] % 2 == 0), i)


def linear(b: Builder, n: Numbers) -> None:
    """On features, or on the channels of a map, moved to the end."""
    i = b.take(n[0])
    assert i is not None
    x, out = b.values[i], 2 + n[1]
    if not fits(out, pixels(x)):
        return
    if not is_map(x):
        b.emit(nn.Linear(x.shape[1], out, bias=n[2] % 2 == 0), i)
    else:
        b.emit(f.channels_first, b.emit(nn.Linear(x.shape[1], out), b.emit(f.channels_last, i)))


def norm(b: Builder, n: Numbers) -> None:
    i = b.take(n[0])
    assert i is not None
    x = b.values[i]
    if n[1] < 6:
        b.emit(BATCH_NORM[dims(x)](x.shape[1], affine=n[1] != 5), i)
    elif is_map(x) and pixels(x) > 1:
        b.emit(INSTANCE_NORM[dims(x)](x.shape[1], affine=n[2] % 2 == 0), i)


def activation(b: Builder, n: Numbers) -> None:
    i = b.take(n[0])
    assert i is not None
    c = b.values[i].shape[1]
    makes = (nn.ReLU, nn.Hardswish, nn.Sigmoid, nn.SiLU, nn.PReLU, partial(nn.PReLU, c), partial(nn.PReLU, c))
    b.emit(makes[n[1] % len(makes)](), i)


def layer_scale(b: Builder, n: Numbers) -> None:
    """A raw parameter, of shape (C,) or (1, C, 1, ...), that is multiplied or added."""
    i = b.take(n[0])
    assert i is not None
    x = b.values[i]
    c = x.shape[1]
    if n[1] % 3 == 0:
        b.emit(f.scale, i, b.parameter(torch.rand(c) + 0.5))
    else:
        ones = [1] * dims(x)
        shape = [c, *ones] if n[2] % 2 else [1, c, *ones]
        b.emit(f.multiply if n[1] % 3 == 1 else f.add, i, b.parameter(torch.rand(shape) + 0.5))


def summed(b: Builder, n: Numbers) -> None:
    i = b.take(n[0])
    assert i is not None
    shape = b.values[i].shape
    others = [k for k in range(len(b.values)) if k != i and b.values[k].shape == shape]
    if others:
        how = (f.add, f.add, f.add_in_place, f.multiply)[n[2] % 4]
        b.emit(how, i, others[-1 - n[1] % len(others)])


def residual(b: Builder, n: Numbers) -> None:
    """A convolution that does not change the shape, with the identity beside it."""
    i = b.take(n[0], is_map)
    if i is None:
        return
    x = b.values[i]
    j = b.emit(CONV[dims(x)](x.shape[1], x.shape[1], 3, padding=1, bias=n[1] % 2 == 0), i)
    if n[2] % 2 == 0:
        j = b.emit(BATCH_NORM[dims(x)](x.shape[1]), j)
    b.emit(f.add, i, j)


def concatenated(b: Builder, n: Numbers) -> None:
    i = b.take(n[0])
    assert i is not None
    x = b.values[i]
    others = [
        k for k in range(1, len(b.values)) if b.values[k].dim() == x.dim() and b.values[k].shape[2:] == x.shape[2:]
    ]
    if not others:
        return
    parts = [i, others[-1 - n[1] % len(others)]]
    if n[3] > 4:
        parts.append(others[-1 - n[2] % len(others)])
    if n[3] % 2:
        parts.reverse()
    if fits(sum(b.values[k].shape[1] for k in parts), pixels(x)):
        b.emit(f.concatenate, *parts)


def divided(b: Builder, n: Numbers) -> None:
    """Chunk, split at fixed places or at sizes that a module keeps, slices."""
    i = b.take(n[0], lambda x: x.shape[1] > 3)
    if i is None:
        return
    c = b.values[i].shape[1]
    at, pieces = 1 + n[2] % (c - 1), next((p for p in (2 + n[2] % 3, 2, 3) if c % p == 0), 2)
    how = n[1]
    if how < 3:
        b.emit(partial(f.chunk, pieces=pieces), i)
    elif how == 3:
        b.emit(Split([at, c - at]), i)
    elif how == 4:
        b.emit(partial(f.split_at, sizes=[at, c - at]), i)
    elif how == 5:
        b.emit(f.halves, i)
    elif how == 6:
        b.emit(partial(f.slice_of, start=None, stop=at), i)
        b.emit(partial(f.slice_of, start=at, stop=None), i)
    else:
        b.emit(partial(f.slice_of, start=at if n[3] % 2 else None, stop=None if n[3] % 2 else at), i)


def shuffled(b: Builder, n: Numbers) -> None:
    found = in_groups(b, n[0], n[1])
    if found is None:
        return
    i, x, g = found
    if n[2] < 5:
        b.emit(partial(f.shuffle, groups=g), i)
    elif n[2] == 5 and dims(x) > 1:
        b.emit(nn.ChannelShuffle(g), i)
    else:
        b.emit(f.flip, i)


def squeeze_excite(b: Builder, n: Numbers) -> None:
    i = b.take(n[0], is_map)
    if i is None:
        return
    x, inner = b.values[i], 2 + n[1]
    c, d = x.shape[1], dims(x)
    if n[2] % 2:
        j = b.emit(CONV[d](c, inner, 1), b.emit(f.pooled_map, i))
        j = b.emit(CONV[d](inner, c, 1), b.emit(nn.ReLU(), j))
    else:
        j = b.emit(nn.Linear(c, inner), b.emit(f.pooled, i))
        j = b.emit(nn.Linear(inner, c), b.emit(nn.ReLU(), j))
        j = b.emit(partial(f.as_map, dims=d), j)
    b.emit(f.gate, i, j)


def spatial_gate(b: Builder, n: Numbers) -> None:
    """One value per pixel for all channels."""
    i = b.take(n[0], is_map)
    if i is None:
        return
    x = b.values[i]
    if n[1] < 5:
        j = b.emit(CONV[dims(x)](x.shape[1], 1, 3, padding=1), i)
    else:
        j = b.emit(CONV[dims(x)](1, 1, 3, padding=1), b.emit(f.channel_mean, i))
    b.emit(f.gate, i, j)


def pixel_shuffled(b: Builder, n: Numbers) -> None:
    if n[1] % 2 == 0:
        i = b.take(n[0], lambda x: dims(x) == 2 and x.shape[1] % 4 == 0)
        if i is not None:
            b.emit(nn.PixelShuffle(2), i)
    else:
        i = b.take(n[0], lambda x: dims(x) == 2 and x.shape[2] % 2 == x.shape[3] % 2 == 0 and fits(4 * x.shape[1], 1))
        if i is not None:
            b.emit(nn.PixelUnshuffle(2), i)


def padded(b: Builder, n: Numbers) -> None:
    """Channels of zeros, as in the shortcuts of ResNets for CIFAR."""
    i = b.take(n[0])
    assert i is not None
    x, before, after = b.values[i], n[1] % 3, 1 + n[2] % 4
    if fits(x.shape[1] + before + after, pixels(x)):
        b.emit(partial(f.pad_channels, before=before, after=after), i)


def flattened(b: Builder, n: Numbers) -> None:
    """To features, or the axes of pixels to one."""
    i = b.take(n[0], is_map)
    if i is None:
        return
    x = b.values[i]
    if n[1] == 6 and dims(x) > 1:
        b.emit(f.merge_pixels, i)
    elif n[1] > 3:
        b.emit(f.pooled, i)
    elif x[0].numel() <= 4 * CHANNELS:
        b.emit(f.flatten, i)
    else:
        b.emit(f.flatten, b.emit(nn.AdaptiveAvgPool2d(2) if dims(x) == 2 else partial(reduced, dims=dims(x)), i))


def reduced(x: Tensor, dims: int) -> Tensor:
    """To two pixels along every axis."""
    return (nn.functional.adaptive_avg_pool1d if dims == 1 else nn.functional.adaptive_avg_pool3d)(x, 2)


def unflattened(b: Builder, n: Numbers) -> None:
    """Features to a map, made wide enough by a linear layer where they are not."""
    i = b.take(n[0], lambda x: not is_map(x))
    if i is None:
        return
    x, shape = b.values[i], ((2, 2), (2,), (2, 2, 2), (4,), (2, 1))[n[1] % 5]
    c, side = x.shape[1], torch.Size(shape).numel()
    if n[2] % 3 == 2 or c % side or c == side:
        c = (2 + n[2]) * side
        i = b.emit(nn.Linear(x.shape[1], c), i)
    if n[3] < 5:
        b.emit(partial(f.to_map, pixels=shape), i)
    else:
        b.emit(partial(f.to_fixed_map, channels=c // side, pixels=shape), i)


def resized(b: Builder, n: Numbers) -> None:
    i = b.take(n[0], is_map)
    if i is None:
        return
    x = b.values[i]
    if n[1] > 3 and fits(x.shape[1], pixels(x) * 2 ** dims(x)):
        b.emit(f.upsample, i)
    elif min(x.shape[2:]) > 1:
        b.emit(f.average_pool if n[1] % 2 else f.maximum_pool, i)


def again(b: Builder, n: Numbers) -> None:
    """A layer is called a second time."""
    calls = [(node.what, node.reads[0]) for node in b.net.nodes if isinstance(node.what, str)]
    calls = [(w, r) for w, r in calls if not isinstance(b.net.layers[int(w)], Split)]
    if not calls:
        return
    what, read = calls[-1 - n[1] % len(calls)]
    assert isinstance(read, int)
    old = b.values[read]
    axis = -1 if isinstance(b.net.layers[int(what)], nn.Linear) else 1
    i = b.take(n[0], lambda x: x.dim() == old.dim() and x.shape[axis] == old.shape[axis])
    if i is not None and (not is_map(old) or min(b.values[i].shape[2:]) >= min(old.shape[2:])):
        b.emit(what, i)


def normalised(b: Builder, n: Numbers) -> None:
    """Norms over channels: in groups, of every pixel, written out."""
    i = b.take(n[0], lambda x: x.shape[1] > 1)
    if i is None:
        return
    x = b.values[i]
    c, groups = x.shape[1], [1, *divisors(x.shape[1])]
    if n[1] < 3 and is_map(x) and x[0].numel() > c:
        b.emit(nn.GroupNorm(groups[n[2] % len(groups)], c, affine=n[3] != 0), i)
    elif n[1] < 5:
        norm = (nn.LayerNorm, nn.RMSNorm)[n[2] % 2](c)
        b.emit(f.channels_first, b.emit(norm, b.emit(f.channels_last, i)))
    else:
        b.emit((f.root_mean_square, f.unit_length)[n[2] % 2], i)


def attention(b: Builder, n: Numbers) -> None:
    """Pixels look at each other, with a residual connection or without."""
    i = b.take(n[0], is_map)
    if i is None or pixels(b.values[i]) > 64:
        return
    width = b.values[i].shape[1]
    j = b.emit(Attention(width, 1 + n[1] % 4, 2 + n[2] % 4, packed=n[3] % 2 == 0, fused=n[3] > 2), i)
    if n[2] > 2:
        b.emit(f.add, i, j)


def mixing(b: Builder, n: Numbers) -> None:
    """What no channel can be pruned through, in every fourth step: softmax over channels."""
    i = b.take(n[0], lambda x: x.shape[1] > 1)
    if i is not None and n[3] < 2:
        b.emit(f.softmax, i)


OPERATIONS: dict[str, Callable[[Builder, Numbers], None]] = {
    "conv": conv,
    "norm": norm,
    "activation": activation,
    "sum": summed,
    "residual": residual,
    "cat": concatenated,
    "divide": divided,
    "shuffle": shuffled,
    "depthwise": depthwise,
    "grouped": grouped_conv,
    "gathering": gathering,
    "transposed": transposed,
    "linear": linear,
    "squeeze-excite": squeeze_excite,
    "spatial gate": spatial_gate,
    "scale": layer_scale,
    "pixel shuffle": pixel_shuffled,
    "pad": padded,
    "flatten": flattened,
    "unflatten": unflattened,
    "resize": resized,
    "again": again,
    "normalise": normalised,
    "attention": attention,
    "mixing": mixing,
}
"""The simplest first: a program shrinks towards it."""


@dataclass(frozen=True)
class Program:
    """What a network is made from.

    Attributes:
        dims: axes of pixels of the input.
        channels: of the input.
        steps: in order.
        outputs: 0: all tensors that nothing reads go through a linear layer, and are summed; 1: each is an output by
            itself then; 2: the last one is an output as it is.
    """

    dims: int
    channels: int
    steps: tuple[Step, ...]
    outputs: int = 0

    @torch.no_grad()
    def network(self) -> tuple[Drawn, Tensor]:
        """The network in eval mode, with random values in all of its tensors, and example inputs."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            x = torch.randn(2, self.channels, *[SIDE[self.dims]] * self.dims)
            b = Builder(x)
            stem = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[self.dims]
            b.emit(stem(self.channels, 8, 3, padding=1), 0)
            for name, numbers in self.steps:
                OPERATIONS[name](b, numbers)
            unread = [i for i in range(1, len(b.values)) if i not in b.read]
            last = unread.pop() if self.outputs == 2 else None
            heads = [b.emit(nn.Linear(b.values[i].shape[1], 3), b.emit(f.pooled, i)) for i in unread]
            if self.outputs == 0 and len(heads) > 1:
                heads = [b.emit(f.total, *heads)]
            b.net.results = heads if last is None else [*heads, last]
            net = b.net.eval()
            scramble(net, lambda: net(x), torch.Generator().manual_seed(0))
        return net, x
