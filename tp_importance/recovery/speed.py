"""What makes a training step faster and changes nothing but rounding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..core.guards import Guard

__all__ = ["bfloat16_is_faster", "channels_last", "without_fast_path"]


def bfloat16_is_faster(device: torch.device) -> bool:
    """Whether a device has units for bfloat16; told by what it is and not by a clock, so that runs agree.

    Args:
        device: of the network.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


class without_fast_path(Guard):
    """Let attention run as a module of modules, as in training; the fast path of torch calls no hooks in its inside.

    It also gives zeros, or no tensors of one length, where tokens do not count.
    """

    def _note(self) -> None:
        self._before = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)

    def _restore(self, failed: bool) -> None:
        torch.backends.mha.set_fastpath_enabled(self._before)


def channels_last(batch: Any) -> Any:
    """A batch with its images in the memory format in which convolutions are fastest; everything else stays.

    Args:
        batch: any structure; floating tensors of four dimensions count as images.

    Example:
        >>> x, y = torch.zeros(2, 3, 4, 4), torch.zeros(2)
        >>> images, labels = channels_last((x, y))
        >>> images.is_contiguous(memory_format=torch.channels_last), labels is y
        (True, True)
    """

    def moved(x: Any) -> Any:
        image = isinstance(x, Tensor) and x.dim() == 4 and x.is_floating_point()
        return x.contiguous(memory_format=torch.channels_last) if image else x

    return tree_map(moved, batch)
