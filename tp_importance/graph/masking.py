"""Zero units where they are made and where they are read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core.forward import layer_input, with_input
from .channel_axes import channel_dim
from .groups import Index, PrunableGroups

__all__ = ["masked_units"]


@contextmanager
def masked_units(model: nn.Module, groups: PrunableGroups, removed: Mapping[str, list[int]]) -> Iterator[None]:
    """Zero the channels of ``removed`` units where they are produced and where they are read, inside the context."""
    inputs: dict[str, list[Index]] = defaultdict(list)
    outputs: dict[str, list[Index]] = defaultdict(list)
    for name, units in removed.items():
        for member in groups[name].members:
            if member.kind != "passthrough":
                (inputs if member.role == "in" else outputs)[member.name].append(member.positions(units))
    with ExitStack() as stack:
        for name, positions in inputs.items():
            module = model.get_submodule(name)
            pre = _zero_input(channel_dim(module), torch.as_tensor(np.concatenate(positions)))
            stack.callback(module.register_forward_pre_hook(pre, prepend=True, with_kwargs=True).remove)
        for name, positions in outputs.items():
            module = model.get_submodule(name)
            post = _zero_output(channel_dim(module), torch.as_tensor(np.concatenate(positions)))
            stack.callback(module.register_forward_hook(post, prepend=True).remove)
        yield


def _zero_input(dim: int, positions: Tensor) -> Any:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        x = layer_input(args, kwargs)
        return with_input(args, kwargs, x.index_fill(x.dim() + dim, positions.to(x.device), 0.0))

    return hook


def _zero_output(dim: int, positions: Tensor) -> Any:
    def hook(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return output.index_fill(output.dim() + dim, positions.to(output.device), 0.0)

    return hook
