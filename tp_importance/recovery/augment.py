"""What is done to images before a network learns from them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map

__all__ = ["shifted_and_flipped"]

SHIFT = 8
"""Images move by up to their size over this."""


def shifted_and_flipped(batch: Any, generator: torch.Generator) -> Any:
    """Move every image of a batch a little, its border reflected, and mirror every second one at random.

    Args:
        batch: tensors of shape (N, C, H, W) with more than one pixel, floating, are images; of the same size, they move
            together. Everything else stays as it is.
        generator: CPU generator.

    Returns:
        A batch of the same form.

    Example:
        >>> x, y = torch.randn(4, 3, 8, 8), torch.arange(4)
        >>> moved, same = shifted_and_flipped((x, y), torch.Generator().manual_seed(0))
        >>> moved.shape, same is y
        (torch.Size([4, 3, 8, 8]), True)
    """
    drawn: dict[tuple[int, int, int], tuple[Tensor, Tensor, Tensor]] = {}

    def moved(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dim() != 4 or not x.is_floating_point() or min(x.shape[2:]) < 2:
            return x
        n, _, h, w = x.shape
        if (n, h, w) not in drawn:
            sizes = 2 * (h // SHIFT) + 1, 2 * (w // SHIFT) + 1, 2
            down, right, mirrored = (torch.randint(k, (n, 1), generator=generator, device="cpu") for k in sizes)
            drawn[n, h, w] = down, right, mirrored
        return _moved(x, *(choice.to(x.device) for choice in drawn[n, h, w]))

    return tree_map(moved, batch)


def _moved(x: Tensor, down: Tensor, right: Tensor, mirrored: Tensor) -> Tensor:
    n, _, h, w = x.shape
    ph, pw = h // SHIFT, w // SHIFT
    padded = F.pad(x, (pw, pw, ph, ph), mode="reflect")
    rows = down + torch.arange(h, device=x.device)
    columns = right + torch.arange(w, device=x.device)
    columns = torch.where(mirrored > 0, columns.flip(1), columns)
    at = torch.arange(n, device=x.device).view(-1, 1, 1)
    cut = padded.permute(0, 2, 3, 1)[at, rows.unsqueeze(2), columns.unsqueeze(1)]
    return cut.permute(0, 3, 1, 2).contiguous()
