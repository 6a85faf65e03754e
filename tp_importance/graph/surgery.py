"""Physical removal of units, by Torch-Pruning's dependency graph."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..core.guards import preserved
from .groups import ChannelGroup, PrunableGroups

__all__ = ["checked_units", "remove_units", "settled"]


def remove_units(groups: PrunableGroups, removed: Mapping[str, Sequence[int]]) -> None:
    """Remove units from the traced model, in place.

    Parameters that are cut become new objects without a gradient, in the memory format of the old ones; all others keep
    theirs. Training modes and ``requires_grad`` stay as they were (Torch-Pruning thaws
    frozen parameters). Every call of Torch-Pruning's surgery adds one entry to its pruning history.

    Args:
        groups: the groups of the model as it is now.
        removed: units to remove, per group name; every group must keep at least ``min_units``.

    Raises:
        ValueError: if a name or unit is unknown, or too few units would be left.
        RuntimeError: if Torch-Pruning did not remove exactly what was asked for.
    """
    # groups that a split made of one dimension share a root, and its indices shift with the first removal
    by_root: dict[tuple[str, str], list[int]] = defaultdict(list)
    for group, units in checked_units(groups, removed):
        by_root[group.root] += group.removed_channels(units)
    with settled(groups.trace.model), preserved(groups.trace.model):
        for (name, role), channels in by_root.items():
            _remove(groups, name, role, sorted(channels))


def checked_units(groups: PrunableGroups, removed: Mapping[str, Sequence[int]]) -> list[tuple[ChannelGroup, list[int]]]:
    """The groups that lose units, and these, ascending.

    Raises:
        ValueError: if a name or unit is unknown, or too few units would be left.
    """
    plan = [(groups[name], sorted(set(map(int, units)))) for name, units in removed.items() if len(units)]
    for group, units in plan:
        if units[0] < 0 or units[-1] >= group.n_units:
            raise ValueError(f"group {group.name} has units 0..{group.n_units - 1}; {units} cannot be removed")
        if group.n_units - len(units) < group.min_units:
            raise ValueError(
                f"group {group.name} keeps at least {group.min_units} of its {group.n_units} units; "
                f"{len(units)} were to go"
            )
    return plan


def _remove(groups: PrunableGroups, name: str, role: str, channels: list[int]) -> None:
    graph, module = groups.trace.graph, groups.trace.model.get_submodule(name)
    pruner = graph.get_pruner_of_module(module)
    fn = pruner.prune_out_channels if role == "out" else pruner.prune_in_channels
    count = graph.get_out_channels if role == "out" else graph.get_in_channels
    before = count(module)
    graph.get_pruning_group(module, fn, channels).prune()
    if count(module) != before - len(channels):
        raise RuntimeError(f"Torch-Pruning left {count(module)} channels in {name}, not {before - len(channels)}")


@contextmanager
def settled(model: nn.Module) -> Iterator[None]:
    """Around a surgery: new parameters and buffers are laid out in memory as those they replace, and have no gradient.

    Torch-Pruning gives contiguous ones, and cuts gradients along, which then look like those of the smaller network.

    Args:
        model: the network.

    Example:
        >>> net = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
        >>> with settled(net):
        ...     net.weight = nn.Parameter(net.weight[:2].contiguous())
        >>> net.weight.is_contiguous(memory_format=torch.channels_last)
        True
    """
    before = dict(_tensors(model))
    yield
    for name, tensor in _tensors(model):
        old = before.get(name)
        if old is None or old is tensor:
            continue
        tensor.grad = None
        layout = _LAST.get(old.dim())
        if layout is not None and tensor.dim() == old.dim() and not old.is_contiguous():
            if old.is_contiguous(memory_format=layout):
                tensor.data = tensor.data.contiguous(memory_format=layout)


_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)
