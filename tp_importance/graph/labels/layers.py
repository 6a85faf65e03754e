"""Label tensors: beside a tensor of shape S, integers of shape S that name the channel an entry belongs to.

0 means no channel. A tensor may have several *layers* of labels, one per axis that holds channels: an entry of a token
mixer belongs to a token channel and to a feature channel. Labels are views of stride 0 along all axes on which they do
not vary, so that a feature map of any height and width costs as much as its channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["along", "axes_of", "compact", "merged", "on_axis", "pairs_of", "tight"]


def axes_of(layer: Tensor) -> tuple[int, ...]:
    """Axes on which labels vary."""
    strides = zip(layer.shape, layer.stride(), strict=True)
    return tuple(k for k, (size, stride) in enumerate(strides) if size > 1 and stride)


def compact(layer: Tensor) -> Tensor:
    """The same with one entry along every axis on which the labels do not vary."""
    for k, stride in enumerate(layer.stride()):
        if stride == 0 and layer.shape[k] > 1:
            layer = layer.narrow(k, 0, 1)
    return layer


def tight(layer: Tensor) -> Tensor | None:
    """The same with stride 0 wherever labels turn out not to vary; ``None`` if nothing has a label.

    Args:
        layer: as an operation has left it, copied perhaps.
    """
    if layer.numel() == 0:
        return None
    shape, small = layer.shape, compact(layer)
    for k in range(small.dim()):
        if small.shape[k] > 1:
            first = small.narrow(k, 0, 1)
            if bool((small == first).all()):
                small = first
    return small.expand(shape) if bool(small.any()) else None


def on_axis(labels: Tensor, axis: int, shape: Sequence[int]) -> Tensor:
    """A layer of a given shape whose labels, of shape (C,), are those of one axis."""
    ones = [1] * len(shape)
    ones[axis] = -1
    return labels.view(ones).expand(tuple(shape))


def merged(layer: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """One label along an axis, whose size becomes 1, for all that are there; and pairs of those that differ, (2, m).

    Entries without a label do not count where others have one.
    """
    small = compact(layer)
    most = small.amax(axis, keepdim=True)
    shape = list(layer.shape)
    shape[axis] = 1
    return most.expand(shape), pairs_of(most.expand_as(small), small)


def along(layer: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Labels per index of an axis, shape (C,), and what meets there besides: pairs of labels, shape (2, m).

    Entries without a label do not count where others at the same index have one: padding of height and width.
    """
    rows = compact(layer).movedim(axis, 0)
    rows = rows.reshape(rows.shape[0], -1).expand(layer.shape[axis], -1)
    if rows.shape[1] == 1:
        return rows[:, 0], rows.new_zeros(2, 0)
    most, pairs = merged(rows, 1)
    return most[:, 0], pairs


def pairs_of(a: Tensor, b: Tensor) -> Tensor:
    """Labels that meet, entry by entry, in two label tensors of one shape; every pair once, shape (2, m)."""
    meet = (a != b) & (a != 0) & (b != 0)
    if not bool(meet.any()):
        return a.new_zeros(2, 0)
    return _unique_pairs(torch.stack([a[meet], b[meet]]))


def _unique_pairs(pairs: Tensor) -> Tensor:
    """Every pair once; pairs have shape (2, m)."""
    if pairs.shape[1] < 2:
        return pairs
    top = int(pairs.max()) + 1
    coded = torch.unique(pairs[0] * top + pairs[1])
    return torch.stack([coded // top, coded % top])
