"""Summarise a layer of many inputs by random combinations of its outputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["SKETCH", "contributions"]

SKETCH = 64
"""Outputs a wider consumer is summarised by; exact if it has no more."""


def contributions(weight: Tensor, channels: Tensor, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    """What every channel adds to a few combinations of the outputs; the signs in them are random.

    Args:
        weight: of the layer, shape (O, d).
        channels: the channel of every feature, shape (d,).
        generator: draws the signs if there are more than :data:`SKETCH` outputs.

    Returns:
        Function of rows (R, 1, d), with contributions (R, S, C).
    """
    if weight.shape[0] > SKETCH:
        signs = torch.randint(0, 2, (SKETCH, weight.shape[0]), generator=generator, device="cpu") * 2 - 1
        weight = signs.to(weight) @ weight / SKETCH**0.5
    channels = channels.to(weight.device)
    width = int(channels.max()) + 1

    def project(rows: Tensor) -> Tensor:
        flat = rows.flatten(1)
        result = flat.new_zeros(len(flat), len(weight), width)
        for s, combination in enumerate(weight):  # keeps the largest temporary at (R, d)
            result[:, s].index_add_(1, channels, flat * combination)
        return result

    return project
