"""On which device and in which dtype inputs must be, and moving them there."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from .batches import tensors_in

__all__ = ["misplaced", "reference_tensor", "to_model"]


def reference_tensor(model: nn.Module) -> Tensor | None:
    """The tensor whose device and dtype inputs of ``model`` must have.

    Args:
        model: any module.

    Returns:
        The first floating parameter, else the first floating buffer, else the first parameter or buffer, else ``None``.
    """
    fallback = None
    for tensor in chain(model.parameters(), model.buffers()):
        if tensor.is_floating_point():
            return tensor
        fallback = tensor if fallback is None else fallback
    return fallback


def to_model(model: nn.Module | Tensor | None, obj: Any) -> Any:
    """Move tensors to the device of the model, floating ones also to its floating dtype.

    Args:
        model: the model, or a tensor to follow instead (``None``: leave ``obj`` as it is).
        obj: tensor or nested tuples (named ones too), lists and dicts of tensors; anything else stays itself.

    Returns:
        The same structure; tensors that are already right are not copied.

    Example:
        >>> import torch
        >>> batch = to_model(nn.Linear(2, 2).half(), {"x": torch.zeros(1, 2), "ids": torch.tensor([3])})
        >>> batch["x"].dtype, batch["ids"].dtype
        (torch.float16, torch.int64)
    """
    like = reference_tensor(model) if isinstance(model, nn.Module) else model
    if like is None:
        return obj
    if isinstance(obj, Tensor):
        both_floating = obj.is_floating_point() and like.is_floating_point()
        return obj.to(device=like.device, dtype=like.dtype if both_floating else obj.dtype)
    if isinstance(obj, Mapping):
        return {key: to_model(like, value) for key, value in obj.items()}
    if isinstance(obj, tuple) and hasattr(obj, "_make"):
        return obj._make(to_model(like, item) for item in obj)
    if isinstance(obj, tuple):
        return tuple(to_model(like, item) for item in obj)
    if isinstance(obj, list):
        return [to_model(like, item) for item in obj]
    return obj


def misplaced(model: nn.Module, example_inputs: Any) -> str:
    """What a network that fails on its example inputs may suffer from: another device or precision, or a low one.

    Args:
        model: the network.
        example_inputs: what it failed on.

    Returns:
        The reason and the remedy, or nothing.

    Example:
        >>> import torch
        >>> misplaced(nn.Linear(2, 2).half(), torch.zeros(1, 2))
        'example_inputs are float32 and the weights float16: pass example_inputs.to(torch.float16), or model.float()'
    """
    like = reference_tensor(model)
    if like is not None and like.is_meta:
        return "the weights are on the device meta, where tensors have no values: load the weights first"
    for tensor in [] if like is None else tensors_in(example_inputs):
        assert like is not None
        if tensor.device != like.device:
            return f"example_inputs are on {tensor.device} and the weights on {like.device}: bring them together"
        if tensor.is_floating_point() and like.is_floating_point() and tensor.dtype != like.dtype:
            names = [str(t.dtype).removeprefix("torch.") for t in (tensor, like)]
            return (
                f"example_inputs are {names[0]} and the weights {names[1]}: pass example_inputs.to({like.dtype}), or "
                "model.float()"
            )
    if like is not None and like.dtype in (torch.float16, torch.bfloat16):
        return f"the weights are {like.dtype}, which not every layer takes on every device: try model.float()"
    return ""
