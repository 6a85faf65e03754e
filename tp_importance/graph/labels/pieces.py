"""Channels that the code cuts into pieces, by ``chunk``, ``split`` or slices: what can still go."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .attributes import Named, WatchedSizes
from .calls import Call
from .ledger import Follower, Option, Question
from .reasons import Index

__all__ = ["Pieces", "followers_of"]


@dataclass
class _Cut:
    """All cuts through one axis of one tensor."""

    labels: Index
    where: str
    bounds: list[tuple[int, int]] = field(default_factory=list)
    followers: list[Follower] = field(default_factory=list)
    whole: bool = False  # cut into pieces that together are the axis
    told: bool = False  # the sizes were given, by numbers that modules keep
    heads: list[Follower] = field(default_factory=list)  # numbers of which the sizes are multiples
    blocks: list[Index] = field(default_factory=list)  # labels by such a number, shape (value, size)


class Pieces:
    """Collects cuts during a pass; several slices of one tensor are judged together."""

    def __init__(self) -> None:
        self._of: Any = WeakTensorKeyDictionary()
        self._cuts: list[_Cut] = []

    def add(
        self,
        tensor: Tensor,
        axis: int,
        labels: Tensor,
        bounds: Sequence[tuple[int, int]],
        sizes: WatchedSizes,
        call: Call,
    ) -> None:
        """Note a cut.

        Args:
            tensor: what is cut.
            axis: along this axis.
            labels: on that axis, shape (C,).
            bounds: first index of every piece, and index behind its last.
            sizes: of the running function.
            call: the operation.
        """
        known = self._of.setdefault(tensor, {})
        if axis not in known:
            known[axis] = _Cut(labels.cpu().numpy(), call.where)
            self._cuts.append(known[axis])
        cut = known[axis]
        cut.bounds += bounds
        cut.whole |= len(bounds) > 1
        found = [labels[s:e] for s, e in bounds] + [labels[:s] for s, e in bounds if s]
        followers = followers_of(sizes.sizes, [*found, labels])
        cut.followers += followers
        cut.told |= sizes.function == "split" and bool(followers)
        for follower, blocks in _heads(sizes.sizes, found):
            cut.heads.append(follower)
            cut.blocks.append(blocks)

    def questions(self, dimensions: Index) -> Iterable[Question]:
        """What is open about all cuts.

        Args:
            dimensions: labels of dimensions of heads, if these may go.
        """
        for cut in self._cuts:
            labels, n = cut.labels, len(cut.labels)
            ends = sorted({0, n, *(b for bound in cut.bounds for b in bound)})
            sizes = set(np.diff(ends).tolist())
            followers = tuple({f.name: f for f in cut.followers}.values())
            options = []
            if followers and len(followers) == len(cut.bounds) and cut.whole:  # every piece has a size of its own
                options += [Option("every piece has a size that follows", followers=followers)]
            if len(sizes) == 1:
                blocks = labels.reshape(-1, sizes.pop())
                pairs = np.stack([np.broadcast_to(blocks[0], blocks.shape).ravel(), blocks.ravel()])
                ties = pairs[:, (pairs > 0).all(0)]
                options += [Option("the pieces shrink alike", ties, followers=followers)]
                if followers and not cut.told:
                    options += [Option("the pieces shrink alike, by themselves", ties)]
            elif followers and not options:
                options += [Option("the sizes follow", followers=followers)]
            if cut.heads:
                if np.isin(labels[labels > 0], dimensions).all():  # their number follows where heads are told apart
                    options += [Option("the sizes are computed from numbers that follow")]
                ties = np.concatenate([_within(blocks) for blocks in cut.blocks], axis=1)
                options += [Option("the sizes follow a number of blocks", ties, followers=(*cut.heads, *followers))]
            rounded = n % 2 == 1 and not {n // 2, n // 2 + 1}.isdisjoint(ends)  # half of the channels, it seems
            if not cut.whole and not rounded:
                first = labels[: max(e for e in ends if e < n)]
                options += [Option("the code slices at a fixed channel", pinned=first[first > 0])]
            options += [Option("the code cuts channels at fixed places", pinned=labels[labels > 0])]
            yield Question(cut.where, labels[labels > 0], tuple(options))


def _heads(sizes: Sequence[Named], axes: Sequence[Tensor]) -> Iterable[tuple[Follower, Index]]:
    """Numbers of which the lengths of axes are multiples, and the labels of as many blocks."""
    taken = set[int]()
    for size in sizes:
        name, value, kept = size.origin
        i = next((i for i, a in enumerate(axes) if len(a) == int(size) and i not in taken), None)
        if i is not None and 1 < value < len(axes[i]) and len(axes[i]) % value == 0:
            taken.add(i)
            blocks = axes[i].reshape(value, -1).cpu().numpy()
            yield Follower(name, value, blocks.max(1), kept), blocks


def _within(blocks: Index) -> Index:
    """Pairs that tie what is in one block, shape (2, m)."""
    pairs = np.stack([np.broadcast_to(blocks.max(1, keepdims=True), blocks.shape).ravel(), blocks.ravel()])
    return pairs[:, (pairs > 0).all(0)]


def followers_of(sizes: Sequence[Named], axes: Sequence[Tensor]) -> list[Follower]:
    """Numbers that modules keep and that gave the length of an axis, with the labels that they count.

    Args:
        sizes: numbers among the arguments of a function, computed from attributes.
        axes: labels of axes whose lengths may have been given.
    """
    found, taken = [], set[int]()
    for size in sizes:
        name, value, kept = size.origin
        fitting = [i for i, a in enumerate(axes) if len(a) == int(size)]
        i = next((i for i in fitting if i not in taken), fitting[0] if fitting else None)
        if i is None or value % len(axes[i]) or not bool((axes[i] > 0).any()):
            continue
        taken.add(i)  # sizes that are equal are those of the axes one after the other
        found.append(Follower(name, value, axes[i].repeat(value // len(axes[i])).cpu().numpy(), kept))
    return found
