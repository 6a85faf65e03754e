"""The running statistics of a batch norm: whether it has any, and writing new ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..maths.batchnorm import ChannelMoments, follow_change

__all__ = ["has_batch_norm", "is_calibrated", "move_statistics", "write_statistics"]

_BatchNorm = nn.modules.batchnorm._BatchNorm  # 1d, 2d, 3d and Sync


def has_batch_norm(model: nn.Module) -> bool:
    """Whether there is anything for :func:`~tp_importance.recalibrate_batchnorm` to do."""
    return any(map(is_calibrated, model.modules()))


def is_calibrated(module: nn.Module | None) -> bool:
    """Whether a module is a batch norm with running statistics."""
    return isinstance(module, _BatchNorm) and module.running_mean is not None


def write_statistics(layer: Any, name: str, moments: ChannelMoments, batches: int) -> None:
    """Give a batch norm the statistics of its input; ``ValueError`` if they are not finite in its precision."""
    _write(layer, name, moments.mean, moments.variance)
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.fill_(batches)


def move_statistics(
    layer: Any, name: str, dense: ChannelMoments, pruned: ChannelMoments, before: Any = None, kept: Tensor | None = None
) -> None:
    """Move the statistics of a batch norm by the change of its input, see :func:`.maths.batchnorm.follow_change`.

    Args:
        layer: the batch norm as it is now, C' channels; gets the new statistics.
        name: its name.
        dense: moments of its input before pruning, shape (C,).
        pruned: moments of its input now, on the same batches, shape (C',).
        before: the batch norm before pruning; default: ``layer``.
        kept: positions of the channels that are left, shape (C',); default: all.

    Raises:
        ValueError: if the result is not finite in the precision of the layer.
    """
    before, here = layer if before is None else before, pruned.mean.device
    mean, var = before.running_mean.to(here), before.running_var.to(here)
    dense = ChannelMoments(dense.count, dense.mean.to(here), dense.m2.to(here))
    if kept is not None:
        mean, var, dense = mean[kept.to(here)], var[kept.to(here)], dense.take(kept)
    _write(layer, name, *follow_change(mean, var, dense, pruned))


def _write(layer: Any, name: str, mean: Tensor, var: Tensor) -> None:
    for key, value in (("running_mean", mean), ("running_var", var)):
        buffer = getattr(layer, key)
        buffer.copy_(value)
        if not torch.isfinite(buffer).all():
            raise ValueError(
                f"layer {name!r}: {key} is not finite in {buffer.dtype} (largest value {value.abs().max().item():g}); "
                "check the batches for NaN and inf, or keep batch normalisation in float32"
            )
