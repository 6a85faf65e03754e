"""What two networks that should compute the same are compared by."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..core.copies import copied
from .layer_kinds import is_batch_norm

__all__ = ["StrongNeighbours", "difference", "scrambled_copy"]


def scrambled_copy(
    model: nn.Module, dtype: torch.dtype | None = None, *, shared: Iterable[nn.Parameter] = ()
) -> nn.Module:
    """A copy whose norms and biases do something: at their initial values a wrong surgery can look right.

    Batch norms get new weights; every other parameter of one axis whose entries are all equal, as in a new layer norm,
    gets others, of the same sign.
    In ``dtype``, or where that is ``None`` in float32 for what is of half precision.

    Args:
        model: the network.
        dtype: of the copy.
        shared: parameters of more than one axis whose values the copy is to share, see :func:`.core.copies.copied`.
    """
    halves = (torch.float16, torch.bfloat16)
    twin = copied(model, shared=(p for p in shared if p.dim() > 1)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.is_floating_point() and (dtype is not None or parameter.dtype in halves):
                parameter.data = parameter.data.to(dtype or torch.float32)
        for buffer_owner in twin.modules():
            for key, buffer in buffer_owner.named_buffers(recurse=False):
                if buffer.is_floating_point() and (dtype is not None or buffer.dtype in halves):
                    setattr(buffer_owner, key, buffer.to(dtype or torch.float32))
            norm = is_batch_norm(buffer_owner) or isinstance(buffer_owner, nn.modules.instancenorm._InstanceNorm)
            for key, low, high in (("weight", 0.5, 1.5), ("bias", -0.5, 0.5)) if norm else ():
                value = getattr(buffer_owner, key)
                if isinstance(value, Tensor):
                    shape = value.shape
                    value.copy_(torch.rand(shape, generator=generator, device="cpu") * (high - low) + low)
        for parameter in twin.parameters():
            if parameter.dim() == 1 and len(parameter) > 1 and parameter.is_floating_point():
                noise = torch.rand(parameter.shape, generator=generator, device="cpu").to(parameter) - 0.5
                if bool((parameter == parameter[0]).all()):
                    parameter.copy_(parameter * (1 + noise) if parameter[0] else noise)
    return twin


class StrongNeighbours(TorchFunctionMode):
    """Lets local response norms be felt: as usually set, neighbours move a channel by less than the tolerance."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is nn.functional.local_response_norm:
            args, kwargs = args[:2], {**kwargs, "alpha": 1.0, "beta": 0.75, "k": 1.0}
        return func(*args, **kwargs)


def difference(a: Tensor, b: Tensor, tolerance: float) -> str | None:
    """How ``b`` differs from ``a`` by more than ``tolerance`` times the largest value of ``a``, or ``None``."""
    if a.shape != b.shape:
        return f"shape {tuple(b.shape)} after removal, {tuple(a.shape)} masked"
    if not a.is_floating_point() and not a.is_complex():  # masks, argmax
        return None if torch.equal(a, b) else f"{a.dtype} values differ"
    scale = _largest(a)
    if math.isinf(scale):  # a mask of -inf, say, and not a number once it is subtracted
        infinite = a.isinf()
        if not torch.equal(a[infinite], b[infinite]):
            return "is infinite elsewhere than in the masked network"
        a, b = a[~infinite], b[~infinite]
        scale = _largest(a)
    error = _largest(a - b)
    if math.isnan(scale):
        return "is NaN in the masked network itself: look for NaN and inf in the weights and in example_inputs"
    if not error <= tolerance * max(scale, 1e-30):  # NaN counts as a difference
        return f"differs by {error:.2g} on a scale of {scale:.2g}"
    return None


def _largest(values: Tensor) -> float:
    """Largest magnitude; NaN if one is, 0 of nothing."""
    if not values.numel():
        return 0.0
    if values.is_complex():
        return float(values.abs().max())
    low, high = values.aminmax()  # several times as fast as the maximum of the magnitudes
    return max(-float(low), float(high))
