"""Which positions of a batch count: tokens do, padding does not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .forward import ForwardFn, run_batch

__all__ = ["PaddedForward", "counted_positions", "with_positions"]

PositionsFn = Callable[[Any], Tensor]
"""``positions(batch)``: of a batch as the loader gave it, shape (N, T); zero where a position does not count."""


class PaddedForward:
    """A ``forward_fn`` that also says which tokens of a batch are padding, so that statistics leave them out.

    It is not needed where batches are dicts with an ``attention_mask`` of shape (N, T).

    Args:
        positions: ``positions(batch)`` gives a tensor of shape (N, T), zero at padding.
        forward_fn: ``forward_fn(model, batch)``; default: the network is called as without one.

    Example:
        >>> forward = PaddedForward(lambda batch: batch[0] != 0)
        >>> net = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2))
        >>> batch = (torch.tensor([[3, 5, 0], [7, 0, 0]]), torch.tensor([0, 1]))
        >>> forward(net, batch).shape, forward.positions(batch).sum().item()
        (torch.Size([2, 3, 2]), 3)
    """

    def __init__(self, positions: PositionsFn, forward_fn: ForwardFn | None = None) -> None:
        if not callable(positions):
            raise TypeError(f"positions must be a function of a batch, not {positions!r}")
        self.positions, self._forward_fn = positions, forward_fn

    def __call__(self, model: nn.Module, batch: Any) -> Any:
        """Run the model on a batch."""
        return run_batch(model, batch, self._forward_fn)


def counted_positions(batch: Any, forward_fn: ForwardFn | None = None) -> Tensor | None:
    """Which positions of a batch count, bool, shape (N, T) on the CPU; ``None`` if all do.

    Args:
        batch: as the loader gave it.
        forward_fn: a :class:`PaddedForward` is asked; otherwise ``attention_mask`` counts, if the batch is a dict, or a
            tuple that begins with one, and the mask has two dimensions.

    Raises:
        TypeError: if a :class:`PaddedForward` gives no tensor.
        ValueError: if the tensor does not have two dimensions.
    """
    if isinstance(forward_fn, PaddedForward):
        mask = forward_fn.positions(batch)
        if not isinstance(mask, Tensor):
            raise TypeError(
                f"positions(batch) gives {type(mask).__name__}; a tensor of shape (batch, tokens) is needed"
            )
        if mask.dim() != 2:
            raise ValueError(f"positions(batch) has shape {tuple(mask.shape)}; (batch, tokens) is needed")
    else:
        inner = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        found = inner.get("attention_mask") if isinstance(inner, Mapping) else None
        if not isinstance(found, Tensor) or found.dim() != 2:
            return None
        mask = found
    counts = (mask != 0).detach().cpu()
    return None if bool(counts.all()) else counts


def with_positions(labels: Tensor, counts: Tensor | None) -> Tensor:
    """Labels of positions, shape (N, T), -1 where one does not count; the labels themselves if all count.

    Args:
        labels: of samples, shape (N,), negative where one does not count.
        counts: of :func:`counted_positions`.

    Raises:
        ValueError: if they are of different numbers of samples.
    """
    if counts is None:
        return labels
    if len(counts) != len(labels):
        raise ValueError(f"positions of {len(counts)} samples for a batch of {len(labels)}")
    return torch.where(counts.to(labels.device), labels.unsqueeze(1), -1)
