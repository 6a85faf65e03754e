"""Samples that train and samples that choose."""

from __future__ import annotations

from typing import Any

import torch

from ..core.batches import FlatBatch, joined, sample_count, tensors_in

__all__ = ["divided", "first", "mixed", "size", "steps"]

LEAST = 10
"""Samples that choose at least."""
FEW = 100
"""With fewer samples all of them train and all choose."""


def divided(
    batches: list[Any], held_out: float, batch_size: int, generator: torch.Generator
) -> tuple[list[Any], list[Any]]:
    """Batches that train, and those that choose.

    Samples are divided at random; batches that are not made of tensors of one length are taken as a whole.

    Args:
        batches: all there are.
        held_out: fraction of the samples that choose.
        batch_size: samples per step.
        generator: on the CPU.

    Example:
        >>> train, choose = divided(list(torch.zeros(200, 3).split(50)), 0.1, 50, torch.Generator())
        >>> sum(map(len, train)), sum(map(len, choose))
        (180, 20)
    """
    samples = sum(map(size, batches))
    if samples < FEW:
        return batches, batches
    wanted, flat = max(LEAST, round(held_out * samples)), [FlatBatch.of(b) for b in batches]
    whole = FlatBatch.of(joined(flat))
    if whole is not None:
        order = torch.randperm(samples, generator=generator, device="cpu")
        return [joined([_chosen(whole, order[wanted:])])], _pieces(_chosen(whole, order[:wanted]), 2 * batch_size)
    return _apart(batches, flat, wanted / samples, generator)


def _apart(
    batches: list[Any], flat: list[FlatBatch | None], share: float, generator: torch.Generator
) -> tuple[list[Any], list[Any]]:
    """A share of the samples of batches that do not fit together, and of the batches that cannot be cut."""
    parts = [f for f in flat if f is not None]
    uncut = [b for b, f in zip(batches, flat, strict=True) if f is None]
    samples = sum(f.samples for f in parts)
    chooses = torch.zeros(samples, dtype=torch.bool, device="cpu")
    chooses[torch.randperm(samples, generator=generator, device="cpu")[: round(share * samples)]] = True
    train, choose = list[Any](), list[Any]()
    for f, marks in zip(parts, chooses.split([f.samples for f in parts]), strict=True):
        for side, at in ((choose, marks.nonzero().flatten()), (train, (~marks).nonzero().flatten())):
            side += [joined([_chosen(f, at)])] if len(at) else []
    order = torch.randperm(len(uncut), generator=generator, device="cpu").tolist()
    held = round(share * len(uncut))
    choose += [uncut[i] for i in order[:held]]
    train += [uncut[i] for i in order[held:]]
    return (train, choose) if train and choose else (batches, batches)


def mixed(batch: Any, batch_size: int, generator: torch.Generator) -> list[Any]:
    """A batch in a new order and cut into those of one step; as it is where it cannot be cut, or need not."""
    flat = FlatBatch.of(batch)
    if flat is None or flat.samples <= batch_size:
        return [batch]
    return _pieces(_chosen(flat, torch.randperm(flat.samples, generator=generator, device="cpu")), batch_size)


def steps(batch: Any, batch_size: int) -> int:
    """How many batches :func:`mixed` makes."""
    flat = FlatBatch.of(batch)
    return 1 if flat is None else -(-flat.samples // batch_size)


def size(batch: Any) -> int:
    """Samples of a batch; one if it does not say."""
    return sample_count(tensors_in(batch)) or 1


def first(batch: Any, samples: int) -> Any:
    """The first samples of a batch, or all if it cannot be cut."""
    flat = FlatBatch.of(batch)
    return batch if flat is None else joined([flat.part(0, samples)])


def _chosen(flat: FlatBatch, at: torch.Tensor) -> FlatBatch:
    return FlatBatch([t[at] for t in flat.tensors], flat.form)


def _pieces(flat: FlatBatch, samples: int) -> list[Any]:
    return [joined([flat.part(i, i + samples)]) for i in range(0, flat.samples, samples)]
