"""The samples of a loader in batches of a size that suits the work, read from it once where memory allows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from .batches import FlatBatch, joined, tensors_in
from .forward import fresh_inputs
from .loaders import iterate, require_reiterable

__all__ = ["Chunks"]


class Chunks:
    """Batches of a number of samples, made of those of a loader; re-iterable.

    Batches that are not made of tensors of one length stay as they are, and so do those that do not fit together.

    Args:
        loader: iterable of batches.
        samples: how many a batch has; the last one, and one before batches of another form, may have fewer.
        limit: bytes up to which all are kept, and the loader is read no more.

    Attributes:
        kept: all batches, once they have been read and if they fit into memory.

    Raises:
        TypeError: while iterating a second time, if they do not fit and the loader gives its batches only once.

    Example:
        >>> import torch
        >>> [len(x) for x in Chunks([torch.zeros(5, 3), torch.zeros(4, 3)], 4)]
        [4, 4, 1]
        >>> [len(x) for x in Chunks([torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(1, 4)], 4)]
        [4, 1]
    """

    def __init__(self, loader: Iterable[Any], samples: int, limit: int = 0) -> None:
        self._loader, self._samples, self._limit = loader, samples, limit
        self._read = False
        self.kept: list[Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        if self.kept is not None:
            yield from self.kept
            return
        if self._read:
            require_reiterable(self._loader)
        kept: list[Any] = []
        left: float = self._limit
        for batch in self._chunks():
            left -= sum(x.numel() * x.element_size() for x in tensors_in(batch))
            if left >= 0:
                kept.append(batch)
            else:
                kept.clear()
            yield batch
        if left >= 0:
            self.kept = kept
        self._read = True

    def _chunks(self) -> Iterator[Any]:
        held: list[FlatBatch] = []
        for batch in map(fresh_inputs, iterate(self._loader)):  # the loader may use the memory again
            flat = FlatBatch.of(batch)
            if flat is None or (held and joined([held[0].part(0, 1), flat.part(0, 1)]) is None):
                yield from (joined([part]) for part in held)
                held = []
            if flat is None:
                yield batch
                continue
            held += [flat] if flat.samples else []
            while (there := sum(part.samples for part in held)) >= self._samples:
                over = held[-1].part(held[-1].samples - (there - self._samples), None)
                held[-1] = held[-1].part(0, held[-1].samples - over.samples)
                yield joined(held)
                held = [over] if over.samples else []
        if held:
            yield joined(held)
