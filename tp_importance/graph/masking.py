"""Zero units where they are made and where they are read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core.forward import layer_input, with_input
from .channel_axes import channel_dim
from .groups import Index, Normalised, PrunableGroups
from .kept_statistics import Kept, KeptStatistics, StatisticCall

__all__ = ["kept_of", "masked_units"]


@contextmanager
def masked_units(
    model: nn.Module, groups: PrunableGroups, removed: Mapping[str, list[int]]
) -> Iterator[KeptStatistics]:
    """Zero the channels of ``removed`` units where they are produced and where they are read, inside the context.

    Means, variances and norms over channels run over those that are kept. Weights that no layer owns (of
    ``F.conv2d(x, self.weight)``, say) have zeros there meanwhile.

    Args:
        model: the network.
        groups: its groups.
        removed: units, by group.

    Yields:
        What keeps statistics over channels to those that stay.
    """
    weights: list[tuple[Tensor, int, Index]] = []
    inputs: dict[str, list[Index]] = defaultdict(list)
    outputs: dict[str, list[Index]] = defaultdict(list)
    for name, units in removed.items():
        for member in groups[name].members:
            if member.axis is not None:
                weights.append((_tensor(model, member.name), member.axis, member.positions(units)))
            elif member.kind != "passthrough":
                (inputs if member.role == "in" else outputs)[member.name].append(member.positions(units))
    with ExitStack() as stack:
        for weight, axis, gone in weights:
            one_per_channel = sum(size > 1 for size in weight.shape) < 2  # a scale, say: one may divide by it
            if weight.is_floating_point() and not one_per_channel:
                stack.callback(_put_back, weight, weight.detach().clone())
                with torch.no_grad():
                    weight.index_fill_(axis, torch.as_tensor(gone, device=weight.device), 0.0)
        for name, positions in inputs.items():
            module = model.get_submodule(name)
            pre = _zero_input(channel_dim(module), torch.as_tensor(np.concatenate(positions), device="cpu"))
            stack.callback(module.register_forward_pre_hook(pre, with_kwargs=True).remove)
        for name, positions in outputs.items():
            module = model.get_submodule(name)
            post = _zero_output(channel_dim(module), torch.as_tensor(np.concatenate(positions), device="cpu"))
            stack.callback(module.register_forward_hook(post, prepend=True).remove)
        statistics = KeptStatistics(kept_of(groups, removed))
        stack.enter_context(statistics.running(model))
        yield statistics


def kept_of(groups: PrunableGroups, removed: Mapping[str, Iterable[int]]) -> dict[StatisticCall, Kept]:
    """What statistics over channels run over if some units are removed.

    Args:
        groups: the groups.
        removed: units, by group.

    Raises:
        ValueError: if norm groups would keep different numbers of channels.
    """
    gone: dict[StatisticCall, list[Index]] = defaultdict(list)
    about: dict[StatisticCall, Normalised] = {}
    for name, units in removed.items():
        units = list(units)
        for statistic in groups[name].statistics if units else ():
            about[statistic.call] = statistic
            gone[statistic.call].append(statistic.member.positions(units))
    found = {}
    for call, positions in gone.items():
        statistic = about[call]
        width, axis = statistic.member.width, statistic.member.axis
        kept = np.setdiff1d(np.arange(width), np.concatenate(positions))
        left, sizes = np.unique(kept // (width // statistic.groups), return_counts=True)
        if len(set(sizes.tolist())) > 1:  # the norm divides what is left evenly: channels would change their norm group
            raise ValueError(
                f"{call} would keep {sizes.tolist()} channels of its norm groups, which must be of one size"
            )
        assert axis is not None
        found[call] = Kept(axis, torch.as_tensor(kept, device="cpu"), width, len(left))
    return found


def _tensor(model: nn.Module, name: str) -> Tensor:
    owner, _, key = name.rpartition(".")
    return getattr(model.get_submodule(owner), key)


def _put_back(tensor: Tensor, before: Tensor) -> None:
    with torch.no_grad():
        tensor.copy_(before)


def _zero_input(dim: int, positions: Tensor) -> Any:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        x = layer_input(args, kwargs)
        return with_input(args, kwargs, x.index_fill(x.dim() + dim, positions.to(x.device), 0.0))

    return hook


def _zero_output(dim: int, positions: Tensor) -> Any:
    def hook(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return output.index_fill(output.dim() + dim, positions.to(output.device), 0.0)

    return hook
