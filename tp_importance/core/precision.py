"""Full precision, whatever the user has allowed or asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ContextDecorator, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .guards import Guard

__all__ = ["at_least_float", "full_precision", "undisturbed"]


class full_precision(Guard, ContextDecorator):
    """Switch TensorFloat-32 off inside the block, or a function that it decorates: GPUs use it, with errors of 1e-3.

    Example:
        >>> import torch
        >>> with full_precision():
        ...     torch.backends.cudnn.allow_tf32
        False
    """

    def _note(self) -> None:
        owners: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
        self._before = [(owner, owner.allow_tf32) for owner in owners]
        for owner in owners:
            owner.allow_tf32 = False

    def _recreate_cm(self) -> full_precision:
        return full_precision()  # for every call of a decorated function

    def _restore(self, failed: bool) -> None:
        for owner, allowed in self._before:
            owner.allow_tf32 = allowed


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Statistics in full precision under the user's autocast, and unseen by whoever records operations."""
    # switching autocast off where it is not on takes as long as a small layer
    on = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    with torch._C.DisableTorchFunction(), torch.autocast(device.type, enabled=False) if on else nullcontext():
        yield


def at_least_float(x: Tensor) -> Tensor:
    """Half precision as float32; what is no tensor, such as the outputs of some networks, stays itself."""
    if not isinstance(x, Tensor):
        return x
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
