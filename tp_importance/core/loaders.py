"""Iterate over loaders, and refuse what only looks like one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import cycle
from operator import length_hint
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from .batches import FlatBatch, joined, sample_count, single_label, tensors_in
from .forward import fresh_inputs
from .processes import warn_of_processes

__all__ = ["FirstSamples", "WholeBatches", "check_loader", "iterate", "require_reiterable"]

_ONE_WAY = ("builtins", "itertools", "torch.utils.data.dataloader")
"""Where iterators come from that end for good."""


def iterate(loader: Iterable[Any]) -> Iterator[Any]:
    """Iterate over ``loader``, but not over what only looks like one.

    Args:
        loader: iterable of batches, with or without a length.

    Returns:
        Its iterator.

    Raises:
        TypeError: see :func:`check_loader`; and while iterating, if it is a data set that gives single samples.

    Warns:
        UserWarning: if ``torch.distributed`` runs several processes: each sees its own batches.

    Example:
        >>> import torch
        >>> len(list(iterate([torch.zeros(2, 3), torch.zeros(1, 3)])))
        2
    """
    check_loader(loader)
    warn_of_processes("batches")
    return _batches_of(loader) if isinstance(loader, Dataset) else iter(loader)


class WholeBatches:
    """A loader whose last batch, if it has too few samples by itself, comes as one with the batch before it.

    For statistics that are of a batch: the variance of one sample is none. Other small batches stay as they are, and
    so does a last one that cannot be joined (of another form, or with values that are no tensors).

    Args:
        loader: iterable of batches.
        least: samples that the last batch needs by itself.

    Attributes:
        given: batches that the loader has given in the last pass.

    Example:
        >>> import torch
        >>> [len(batch) for batch in WholeBatches([torch.zeros(4, 3), torch.zeros(4, 3), torch.zeros(1, 3)], 2)]
        [4, 5]
    """

    def __init__(self, loader: Iterable[Any], least: int) -> None:
        check_loader(loader)
        self._loader, self._least, self.given = loader, least, 0

    def __length_hint__(self) -> int:
        return length_hint(self._loader)

    def __iter__(self) -> Iterator[Any]:
        held: list[Any] = []  # a batch, and perhaps a short one behind it
        self.given = 0
        for batch in iterate(self._loader):
            self.given += 1
            if held and (len(held) == 2 or not self._short(batch)):
                yield from held
                held = []
            held.append(fresh_inputs(batch))  # the loader may use the memory again
        together = joined([FlatBatch.of(batch) for batch in held]) if len(held) == 2 else None
        yield from held if together is None else [together]

    def _short(self, batch: Any) -> bool:
        return 0 < (sample_count(tensors_in(batch)) or 0) < self._least


class FirstSamples:
    """The first batches of a loader, up to a number of samples; re-iterable as the loader is.

    Args:
        loader: iterable of batches; a batch without tensors counts as one sample.
        samples: after the batch that reaches this number it ends.

    Attributes:
        loader: what it reads.

    Example:
        >>> import torch
        >>> [len(batch) for batch in FirstSamples([torch.zeros(4, 3)] * 9, 6)]
        [4, 4]
    """

    def __init__(self, loader: Iterable[Any], samples: int) -> None:
        self.loader, self._samples = loader, samples

    def __iter__(self) -> Iterator[Any]:
        seen = 0
        for batch in iterate(self.loader):
            yield batch
            found = sample_count(tensors_in(batch))
            seen += 1 if found is None else found
            if seen >= self._samples:
                return


def check_loader(loader: Any) -> None:
    """Refuse what cannot be an iterable of batches; nothing is read.

    Args:
        loader: what was given for one.

    Raises:
        TypeError: if it cannot be iterated over, is itself one batch (a tensor, a dict, a pair of inputs and labels),
            a ``TensorDataset``, which gives single samples, or an ``itertools.cycle``, which never ends.

    Example:
        >>> import torch
        >>> check_loader((torch.zeros(8, 3), torch.zeros(8, dtype=torch.int64)))
        Traceback (most recent call last):
        TypeError: loader is one pair of tensors of shapes (8, 3) and (8,), not an iterable of batches; pass [(X, Y)], \
or DataLoader(TensorDataset(X, Y), batch_size=64)
    """
    if isinstance(loader, (Tensor, Mapping)):
        remedy = ", or DataLoader(TensorDataset(X), batch_size=64)" if isinstance(loader, Tensor) else ""
        raise TypeError(f"loader is a single {type(loader).__name__}, not an iterable of batches; pass [batch]{remedy}")
    if isinstance(loader, TensorDataset):
        raise TypeError(_single_samples(loader))
    if isinstance(loader, cycle):
        raise TypeError(
            "loader is an itertools.cycle, which never ends; pass its first batches, "
            "list(itertools.islice(loader, 8)), or what it goes round in"
        )
    if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
        raise TypeError(
            f"loader of type {type(loader).__name__} cannot be iterated over; pass an iterable of batches, e.g. "
            "DataLoader(dataset, batch_size=64)"
        )
    if isinstance(loader, (tuple, list)) and len(loader) == 2 and all(isinstance(t, Tensor) for t in loader):
        x, y = loader
        if y.dim() == 1 < x.dim() and len(x) == len(y):  # two batches of inputs would have as many dimensions
            raise TypeError(
                f"loader is one pair of tensors of shapes {tuple(x.shape)} and {tuple(y.shape)}, not an iterable of "
                "batches; pass [(X, Y)], or DataLoader(TensorDataset(X, Y), batch_size=64)"
            )


def require_reiterable(loader: Any) -> None:
    """Refuse a generator, or another iterator of Python or torch, where the batches are needed more than once.

    Iterators of other libraries pass: some start again.

    Raises:
        TypeError: naming the remedy.
    """
    if isinstance(loader, Iterator) and type(loader).__module__ in _ONE_WAY:
        raise TypeError(
            f"loader is a {type(loader).__name__} and gives its batches only once, but several passes are needed; "
            "pass a list of batches, list(loader), or a DataLoader"
        )


def _batches_of(loader: Any) -> Iterator[Any]:
    """The items of a data set, unless the first is a single sample, as a scalar for a label tells."""
    for i, item in enumerate(loader):
        if i == 0 and single_label(item):
            raise TypeError(_single_samples(loader))
        yield item


def _single_samples(loader: Any) -> str:
    return (
        f"loader is a {type(loader).__name__}, which gives single samples, not batches; pass "
        "DataLoader(dataset, batch_size=64), or DataLoader(dataset, batch_size=None) if its items are batches"
    )
