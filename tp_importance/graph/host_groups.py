"""Coupled groups from Torch-Pruning's dependency graph: split into units, numbered, and checked for what is refused."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count, filterfalse
from typing import Any

import numpy as np
import torch_pruning as tp
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import nn

from .groups import ChannelGroup, Excluded, ExclusionKind, Index, Kind, Member, PrunableGroups, Role
from .layer_kinds import CONV, is_depthwise
from .layer_pruners import NEIGHBOURS, ParametrisedPruner
from .reparametrised import computed_tensors
from .tracing import Trace, TraceOptions

__all__ = ["build_groups", "ignored_modules"]

# Normalising over channels or by neighbours, attending or recurring: removing one channel changes the others.
_REFUSED = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.MultiheadAttention, nn.LSTM, *NEIGHBOURS)

_Reason = tuple[ExclusionKind, str]
_AT_MINIMUM: _Reason = ("minimum", "at its smallest width")


def build_groups(
    traced: Trace,
    ignored_layers: Sequence[nn.Module | nn.Parameter | type] | None = None,
    num_heads: Mapping[nn.Module, int] | None = None,
    options: TraceOptions = TraceOptions(),
) -> PrunableGroups:
    """Groups of a traced network, without verification; see :func:`~tp_importance.prunable_groups`."""
    ignored = ignored_modules(traced.model, ignored_layers)
    order = traced.first_call()
    found: list[tuple[ChannelGroup, list[_Reason]]] = []
    for host_group in traced.graph.get_all_groups(root_module_types=(tp.ops.TORCH_CONV, tp.ops.TORCH_LINEAR)):
        parts, why = _convert(traced, host_group, ignored, num_heads or {}, order)
        found += [(group, why) for group in parts]
    groups: list[ChannelGroup] = []
    excluded: list[Excluded] = []
    for group, why in _named_apart(found, order):
        small = group.n_units <= group.min_units
        reasons = [*why, *[_AT_MINIMUM] * small]
        if reasons:  # what was asked for comes last: "ignored" says that the group could be pruned otherwise
            kind, reason = next((r for r in reasons if r[0] != "ignored"), reasons[0])
            excluded.append(Excluded.of(group, reason, kind))
        else:
            groups.append(group)
    return PrunableGroups(groups, excluded, traced, options)


def _named_apart(
    found: Sequence[tuple[ChannelGroup, list[_Reason]]], order: Mapping[str, int]
) -> Iterator[tuple[ChannelGroup, list[_Reason]]]:
    """The groups in execution order; those that share their first producer are numbered.

    Numbers follow from the layers that the channels reach, in execution order, and only for the same layers from the
    positions. Removing channels changes neither, so that a network that is traced again has the same names.
    """
    late = len(order)

    def place(entry: tuple[ChannelGroup, list[_Reason]]) -> Any:
        group = entry[0]
        reached = [(order.get(m.name, late), m.name, m.role, len(m.channels) // group.n_units) for m in group.members]
        first = next((int(m.channels.min()) for m in group.members if m.name == group.name and m.role == "out"), 0)
        return order.get(group.name, late), group.name, reached, first

    shared = Counter(group.name for group, _ in found)
    free = {name: filterfalse(order.__contains__, map(f"{name}/{{}}".format, count())) for name in shared}
    for group, why in sorted(found, key=place):
        yield (group if shared[group.name] == 1 else replace(group, name=next(free[group.name]))), why


def ignored_modules(
    model: nn.Module, ignored_layers: Sequence[nn.Module | nn.Parameter | type] | None
) -> set[nn.Module]:
    """Every module that ``ignored_layers`` names, with everything inside.

    Raises:
        TypeError: for an entry that is neither module, parameter nor type.
    """
    ignored: set[nn.Module] = set()
    for layer in ignored_layers or ():
        if isinstance(layer, nn.Module):
            ignored.update(layer.modules())
        elif isinstance(layer, type):
            for module in model.modules():
                if isinstance(module, layer):
                    ignored.update(module.modules())
        elif isinstance(layer, nn.Parameter):
            ignored.update(m for m in model.modules() if any(p is layer for p in m.parameters(recurse=False)))
        else:
            raise TypeError(f"ignored_layers takes modules, parameters or module types, not {layer!r}")
    return ignored


@dataclass(frozen=True)
class _RawMember:
    """A member before its channels are assigned to units."""

    name: str
    role: Role
    kind: Kind
    channels: Index
    roots: Index
    width: int
    axis: int | None
    blocks: int  # channels j, j + width/blocks, j + 2·width/blocks, ... must go together
    min_units: int


def _convert(
    traced: Trace,
    host_group: Any,
    ignored: set[nn.Module],
    num_heads: Mapping[nn.Module, int],
    order: Mapping[str, int],
) -> tuple[list[ChannelGroup], list[_Reason]]:
    """One Torch-Pruning group in our terms, and the reasons to leave it out.

    Channels that a split sends to different consumers become groups of their own: only then is the cost a function
    of the widths.
    """
    graph, reasons = traced.graph, list[_Reason]()
    raw: list[_RawMember] = []
    for item in host_group:
        module = item.dep.target.module
        role: Role = "out" if graph.is_out_channel_pruning_fn(item.dep.handler) else "in"
        if role == "out" and not item.dep.target.outputs:
            reasons.append(("output", "produces the network's output"))
        if module not in traced.names:  # concat, split, elementwise: no parameters of their own
            continue
        if role == "out" and module in ignored:
            reasons.append(("ignored", f"{traced.names[module]} is in ignored_layers"))
        if isinstance(module, _REFUSED):
            kind = type(module).__name__
            reasons.append(("mixed", f"{traced.names[module]} ({kind}) mixes the channels: none can go exactly"))
        if fixed := _computed(traced, module, role):
            reasons.append(("computed", fixed))
        if item.root_idxs is None or any(i is None for i in item.root_idxs):
            reasons.append(("mixed", f"no index map reaches {traced.names[module]} (grouped-query attention)"))
            continue
        raw.append(_raw_member(traced, item, role, num_heads))
    raw.sort(key=lambda m: (order.get(m.name, len(order)), m.role))
    root_item = host_group[0]
    root: tuple[str, Role] = (
        traced.names[root_item.dep.target.module],
        "out" if graph.is_out_channel_pruning_fn(root_item.dep.handler) else "in",
    )
    units, problem = _units(raw, len(root_item.idxs))
    if problem:
        reasons.append(("mixed", problem))
    if not any(m.kind == "consumer" for m in raw):
        reasons.append(("unread", "nothing with weights reads it"))
    groups = _split_by_signature(next((m.name for m in raw if m.kind == "producer"), root[0]), root, raw, units)
    return groups, reasons


def _computed(traced: Trace, module: Any, role: Role) -> str | None:
    """Why a module cannot lose channels because of what its tensors are computed from, if that is so."""
    found = computed_tensors(module) if isinstance(module, nn.Module) else []
    if not found:
        return None
    pruner = traced.graph.get_pruner_of_module(module)
    if not isinstance(pruner, ParametrisedPruner) and pruner not in traced.graph.REGISTERED_PRUNERS.values():
        return None  # the user's
    dense = isinstance(module, (*CONV, nn.Linear)) and not is_depthwise(module)
    found = [c for c in found if c.leaf == "weight" or role == "out" or not dense]  # inputs have no biases
    possible = not found or (isinstance(pruner, ParametrisedPruner) and pruner.follows[role])
    return None if possible else found[0].reason(traced.names[module])


def _raw_member(traced: Trace, item: Any, role: Role, num_heads: Mapping[nn.Module, int]) -> _RawMember:
    node, graph = item.dep.target, traced.graph
    module = node.module
    depthwise = is_depthwise(module)
    dense = isinstance(module, (*CONV, nn.Linear)) and not depthwise
    width = graph.get_out_channels(node) if role == "out" else graph.get_in_channels(node)
    conv_groups = module.groups if dense and isinstance(module, CONV) else 1
    heads = num_heads.get(module, 1) if role == "out" else 1
    return _RawMember(
        traced.names[module],
        role,
        ("producer" if role == "out" else "consumer") if dense else "passthrough",
        np.asarray(item.idxs, np.int64),
        np.asarray(item.root_idxs, np.int64),
        int(width or len(item.idxs)),
        node.pruning_dim % module.dim() if isinstance(module, nn.Parameter) else None,
        math.lcm(conv_groups, heads),
        # at one unit out_channels == groups, which Torch-Pruning would take for a depthwise convolution
        2 if conv_groups > 1 and role == "out" else 1,
    )


def _units(raw: Sequence[_RawMember], width: int) -> tuple[Index, str | None]:
    """Unit of every root channel: grouped convolutions and heads tie channels of one dimension together."""
    pairs: list[Index] = []
    for m in raw:
        if m.blocks == 1:
            continue
        if m.width % m.blocks:
            return np.arange(width), f"{m.name}: {m.width} channels do not divide into {m.blocks} conv groups or heads"
        root_of = np.full(m.width, -1, np.int64)
        root_of[m.channels] = m.roots
        tied = root_of.reshape(m.blocks, -1)
        if ((tied < 0).any(0) & (tied >= 0).any(0)).any():
            return np.arange(width), f"{m.name} is grouped and reads channels of several groups"
        tied = tied[:, tied[0] >= 0]
        pairs.append(np.stack([np.broadcast_to(tied[0], tied.shape).ravel(), tied.ravel()]))
    if not pairs:
        return np.arange(width, dtype=np.int64), None
    rows, cols = np.concatenate(pairs, axis=1)
    graph = coo_array((np.ones(len(rows), bool), (rows, cols)), shape=(width, width))
    _, units = connected_components(graph, directed=False)
    _, first, inverse = np.unique(units, return_index=True, return_inverse=True)
    return first.argsort().argsort()[inverse].astype(np.int64), None  # numbered by their first channel


def _split_by_signature(
    name: str, root: tuple[str, Role], raw: Sequence[_RawMember], units: Index
) -> list[ChannelGroup]:
    """Groups of units that occupy the same number of channels in the same members; all bear one name still."""
    n_units = int(units.max()) + 1
    counts = [np.bincount(units[m.roots], minlength=n_units) for m in raw]
    signatures, kinds = np.unique(np.stack([np.bincount(units), *counts], axis=1), axis=0, return_inverse=True)
    groups = []
    for kind in range(len(signatures)):
        mine = np.flatnonzero(kinds.ravel() == kind)
        local = np.full(n_units, -1, np.int64)
        local[mine] = np.arange(len(mine))
        of_root = local[units]
        members = []
        for m in raw:
            at = local[units[m.roots]]
            if (at >= 0).any():
                members.append(Member(m.name, m.role, m.kind, m.channels[at >= 0], at[at >= 0], m.width, m.axis))
        groups.append(
            ChannelGroup(
                name,
                int((of_root >= 0).sum()),
                int(signatures[kind][0]),
                tuple(members),
                root,
                np.flatnonzero(of_root >= 0),
                of_root[of_root >= 0],
                max(m.min_units for m in raw),
            )
        )
    return groups
