"""Data for the contracts: labelled batches that can be told apart, and loaders that are wrong in one way each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .networks import NUM_CLASSES

__all__ = ["BAD_LABELS", "BAD_LOADERS", "FailingLoader", "LoaderError", "class_loader", "loader_for"]

Batches = list[tuple[Tensor, Tensor]]
Spoil = Callable[[Batches], Any]


def class_loader(
    n: int = 64,
    classes: int = NUM_CLASSES,
    shape: tuple[int, ...] = (3, 16, 16),
    batch_size: int = 16,
    seed: int = 0,
) -> Batches:
    """Batches of balanced classes: each class is a fixed random pattern plus unit noise.

    Args:
        n: number of samples.
        classes: number of classes.
        shape: of one sample.
        batch_size: samples of a batch.
        seed: of patterns, noise and order.

    Returns:
        Batches of inputs, shape (batch_size, *shape), and labels, shape (batch_size,).

    >>> [(x.shape, y.shape) for x, y in class_loader(n=12, shape=(3, 4, 4), batch_size=8)]
    [(torch.Size([8, 3, 4, 4]), torch.Size([8])), (torch.Size([4, 3, 4, 4]), torch.Size([4]))]
    """
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn(classes, *shape, generator=generator)
    y = torch.arange(n)[torch.randperm(n, generator=generator)] % classes
    x = patterns[y] + torch.randn(n, *shape, generator=generator)
    return list(zip(x.split(batch_size), y.split(batch_size), strict=True))


def loader_for(x: Tensor, n: int = 32, batch_size: int = 16, seed: int = 0) -> Batches:
    """:func:`class_loader` in the shape of a network's inputs ``x``, shape (N, ...)."""
    return class_loader(n=n, shape=tuple(x.shape[1:]), batch_size=batch_size, seed=seed)


BAD_LABELS: dict[str, tuple[Spoil, type[Exception]]] = {
    "unlabelled": (lambda loader: [x for x, _ in loader], ValueError),
    "one class": (lambda loader: [(x, torch.ones_like(y)) for x, y in loader], ValueError),
    "one-hot": (lambda loader: [(x, nn.functional.one_hot(y, NUM_CLASSES)) for x, y in loader], ValueError),
    "float labels": (lambda loader: [(x, y.float()) for x, y in loader], TypeError),
    "out of range": (lambda loader: [(x, y + 1) for x, y in loader], ValueError),
    "negative": (lambda loader: [(x, y - 1) for x, y in loader], ValueError),
    "wrong length": (lambda loader: [(x, y[:-1]) for x, y in loader], ValueError),
}
"""What spoils the labels, and the error that says so."""

BAD_LOADERS: dict[str, tuple[Spoil, type[Exception]]] = {
    "empty": (lambda loader: [], ValueError),
    "used-up generator": (lambda loader: iter(()), ValueError),
    "NaN": (lambda loader: [(x * float("nan"), y) for x, y in loader], ValueError),
    "infinite": (lambda loader: [(x * float("inf"), y) for x, y in loader], ValueError),
    "wrong shape": (lambda loader: [(x[:, :2], y) for x, y in loader], RuntimeError),
    "a tensor": (lambda loader: loader[0][0], TypeError),
    "text": (lambda loader: ["text"], TypeError),
    "no iterable": (lambda loader: 3, TypeError),
    "none": (lambda loader: None, ValueError),
}
"""What spoils a loader, and the error that says so."""


class LoaderError(Exception):
    """Of the user's own loader."""


class FailingLoader:
    """A loader that raises :class:`LoaderError` in one of its passes, or in all of them, after the first batch.

    Args:
        batches: what it gives otherwise.
        fatal: number of the pass that fails, counted from 1; ``None``: every one.

    Attributes:
        passes: passes begun so far.
        error: what is raised.
    """

    def __init__(self, batches: Batches, fatal: int | None = 1) -> None:
        self.batches, self.fatal, self.passes = batches, fatal, 0
        self.error = LoaderError("disk on fire")

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.passes += 1
        yield self.batches[0]
        if self.fatal in (None, self.passes):
            raise self.error
        yield from self.batches[1:]
