"""Coupled channel groups: what a network is to a pruner.

A *group* is a set of channels, spread over many layers, that live or die together. Its atoms are *units*: the
smallest sets of root channels that can go alone. Usually a unit is one channel; a grouped convolution or an
attention head count makes it several.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count, filterfalse
from typing import Any, Literal

import numpy as np
import torch_pruning as tp
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import nn

from ..core.progress import phase, shown
from .layer_pruners import NEIGHBOURS, ParametrisedPruner
from .reparametrised import computed_tensors
from .tracing import CONV, Trace, TraceOptions, is_depthwise, trace

__all__ = [
    "ChannelGroup",
    "Excluded",
    "Member",
    "PrunableGroups",
    "Verifier",
    "build_groups",
    "ignored_modules",
    "prunable_groups",
]

Role = Literal["in", "out"]
Kind = Literal["producer", "reader", "carrier"]
Index = NDArray[np.int64]

# Normalising over channels or by neighbours, attending or recurring: removing one channel changes the others.
_REFUSED = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.MultiheadAttention, nn.LSTM, *NEIGHBOURS)


@dataclass(frozen=True, eq=False)
class Member:
    """One channel dimension that takes part in a group.

    Attributes:
        name: qualified name of the module (or parameter).
        role: ``"out"`` if the output channels of the module go, ``"in"`` if its input channels.
        kind: ``producer`` (conv or linear, out), ``reader`` (conv or linear, in) or ``carrier`` (the rest).
        channels: positions in that dimension, int64, shape (m,).
        units: unit of the group each position belongs to, int64, shape (m,).
        width: size of the whole dimension when the group was built.
    """

    name: str
    role: Role
    kind: Kind
    channels: Index
    units: Index
    width: int

    def positions(self, units: Iterable[int]) -> Index:
        """Positions in this dimension that belong to ``units``."""
        return self.channels[np.isin(self.units, np.fromiter(units, np.int64))]


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels that must live or die together.

    Attributes:
        name: the first producer in execution order. Where its channels belong to several groups (behind a split, say),
            ``/0``, ``/1``, ... tell them apart, in the order of the layers they reach. No two groups of a network bear
            one name, and pruning does not change the names.
        width: number of root channels C_g.
        unit_size: root channels per unit; admissible widths are multiples of it.
        members: everything that changes shape, in execution order.
        root: ``(module name, role)`` Torch-Pruning's surgery starts from.
        root_channels: positions of the channels in the root's dimension, shape (width,).
        root_units: unit of each of them, shape (width,).
        min_units: fewest units the graph allows.
    """

    name: str
    width: int
    unit_size: int
    members: tuple[Member, ...]
    root: tuple[str, Role]
    root_channels: Index
    root_units: Index
    min_units: int = 1

    @property
    def n_units(self) -> int:
        """Number of units."""
        return self.width // self.unit_size

    @cached_property
    def producers(self) -> tuple[Member, ...]:
        """Members whose filters make the channels."""
        return tuple(m for m in self.members if m.kind == "producer")

    @cached_property
    def readers(self) -> tuple[Member, ...]:
        """Members whose weights consume the channels."""
        return tuple(m for m in self.members if m.kind == "reader")

    def member(self, name: str, role: Role) -> Member | None:
        """The member of that module and role, if any."""
        return next((m for m in self.members if m.name == name and m.role == role), None)

    def removed_channels(self, removed_units: Iterable[int]) -> list[int]:
        """Positions of ``removed_units`` in the root's dimension, ascending, as Torch-Pruning wants them."""
        gone = np.isin(self.root_units, np.fromiter(removed_units, np.int64))
        return np.sort(self.root_channels[gone]).tolist()


@dataclass(frozen=True)
class Excluded:
    """A group that is left alone, and why.

    Attributes:
        name: of the group.
        width: its channels.
        reason: why.
        layers: that make the channels.
        ignored: whether ``ignored_layers`` is the only reason.
    """

    name: str
    width: int
    reason: str
    layers: Sequence[str] = field(default=(), compare=False)
    ignored: bool = field(default=False, compare=False)

    @classmethod
    def of(cls, group: ChannelGroup, reason: str, ignored: bool = False) -> Excluded:
        """The same for a group."""
        return cls(group.name, group.width, reason, [m.name for m in group.producers], ignored)


@dataclass
class PrunableGroups:
    """The groups of one network, in execution order, and what was left out.

    Iterates over :class:`ChannelGroup`; ``groups["layer1.0.conv1"]`` looks one up by name.

    Attributes:
        groups: the groups that may be pruned.
        excluded: the groups that may not, with the reason.
        trace: the trace they come from.

    Raises:
        ValueError: if two groups, left out or not, bear one name.
    """

    groups: list[ChannelGroup]
    excluded: list[Excluded]
    trace: Trace = field(repr=False)
    options: TraceOptions = field(default_factory=TraceOptions, repr=False)

    def __post_init__(self) -> None:
        twice = [n for n, c in Counter([*self.names, *(e.name for e in self.excluded)]).items() if c > 1]
        if twice:
            raise ValueError(f"several groups are called {', '.join(twice)}: names of groups must differ")

    def __iter__(self) -> Iterator[ChannelGroup]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, name: str) -> ChannelGroup:
        for group in self.groups:
            if group.name == name:
                return group
        raise ValueError(f"no prunable group is called {name!r}; there are {[g.name for g in self.groups]}")

    @property
    def names(self) -> list[str]:
        """Names of the groups."""
        return [g.name for g in self.groups]

    @property
    def widths(self) -> dict[str, int]:
        """Width of every group, in channels."""
        return {g.name: g.width for g in self.groups}

    def require_some(self) -> None:
        """Refuse a network without a prunable group.

        Raises:
            ValueError: naming what was left out, and why.
        """
        if not self.groups:
            reasons = "; ".join(f"{e.name}: {e.reason}" for e in self.excluded)
            raise ValueError(f"{type(self.trace.model).__name__} has no group that can be pruned ({reasons})")

    def exclude(self, reasons: Mapping[str, str]) -> PrunableGroups:
        """A copy in which the groups named in ``reasons`` are left out."""
        keep = [g for g in self.groups if g.name not in reasons]
        gone = [Excluded.of(g, reasons[g.name]) for g in self.groups if g.name in reasons]
        return PrunableGroups(keep, self.excluded + gone, self.trace, self.options)


Verifier = Callable[[PrunableGroups, Any], Mapping[str, str]]


def prunable_groups(
    model: nn.Module,
    example_inputs: Any,
    ignored_layers: Sequence[nn.Module | nn.Parameter | type] | None = None,
    *,
    num_heads: Mapping[nn.Module, int] | None = None,
    unwrapped_parameters: Sequence[tuple[nn.Parameter, int]] | None = None,
    customized_pruners: Mapping[Any, Any] | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    output_transform: Callable[[Any], Any] | None = None,
    allow_stale: bool = False,
    verify: bool | Verifier = True,
    progress: bool = False,
) -> PrunableGroups:
    """Find the coupled channel groups of any network, and keep only those that can be pruned safely.

    The groups come from Torch-Pruning's dependency graph. Left out, each with its reason, are: the network's
    outputs; groups with an ignored layer; groups whose channels are normalised together (LayerNorm, GroupNorm);
    groups of a single unit; groups that some layer reads in training mode only (an auxiliary head, which the surgery
    would not follow); and every group for which removal is not the same as masking. The last test
    (``verify``, ours) prunes a copy and compares it, at every convolution and linear layer and at the output,
    with the masked original: Torch-Pruning traces some constructions wrongly and prunes them without an error
    (channel padding, uneven chunks).

    Args:
        model: the network; it is not changed.
        example_inputs: tensor, tuple or dict, batch dimension first.
        ignored_layers: modules (with everything inside), parameters or module types that must keep their outputs.
        num_heads: ``{qkv projection: heads}`` as in Torch-Pruning; a unit is then one dimension of every head.
        unwrapped_parameters: ``[(parameter, dim), ...]`` as in Torch-Pruning.
        customized_pruners: as in Torch-Pruning.
        forward_fn: ``forward_fn(model, example_inputs)``; default calls the model.
        output_transform: applied to the network's output before tracing.
        allow_stale: also offer channels that layers read in training mode only. These layers keep their old width, and
            the network fails in training mode once it is pruned.
        verify: compare masked and pruned copies (default). Costs one deep copy, one more trace and two passes. Or a
            function that knows the verdict: ``verify(groups, example_inputs) → reason per unsafe group``.
        progress: show progress bars.

    Returns:
        :class:`PrunableGroups`.

    Raises:
        TracingError: if the network cannot be traced.
        TypeError: for an ``ignored_layers`` entry that is neither module, parameter nor type.
        ValueError: if layers do not run in eval mode, and what they read in training mode cannot be found out.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> groups = prunable_groups(net, torch.randn(1, 3, 8, 8))
        >>> [(g.name, g.width) for g in groups], [e.reason for e in groups.excluded]
        ([('0', 8)], ["produces the network's output"])
    """
    from .modes import read_in_training_only  # both need groups
    from .verify import verify_groups

    options = TraceOptions(
        forward_fn,
        output_transform,
        unwrapped_parameters,
        customized_pruners,
        [p for p in ignored_layers or () if isinstance(p, nn.Parameter)],
    )
    with phase("tracing", progress=progress) as running:
        groups = build_groups(trace(model, example_inputs, options), ignored_layers, num_heads, options)
        if not allow_stale and len(groups):
            groups = groups.exclude(read_in_training_only(groups, example_inputs))
        running.note(groups=len(groups), left_out=len(groups.excluded))
    if not verify or not len(groups):
        return groups
    with shown(progress):
        return groups.exclude((verify if callable(verify) else verify_groups)(groups, example_inputs))


def build_groups(
    traced: Trace,
    ignored_layers: Sequence[nn.Module | nn.Parameter | type] | None = None,
    num_heads: Mapping[nn.Module, int] | None = None,
    options: TraceOptions = TraceOptions(),
) -> PrunableGroups:
    """Groups of a traced network, without verification; see :func:`prunable_groups`."""
    ignored = ignored_modules(traced.model, ignored_layers)
    order = traced.first_call()
    found: list[tuple[ChannelGroup, Any]] = []
    for host_group in traced.graph.get_all_groups(root_module_types=(tp.ops.TORCH_CONV, tp.ops.TORCH_LINEAR)):
        parts, *why = _convert(traced, host_group, ignored, num_heads or {}, order)
        found += [(group, why) for group in parts]
    groups: list[ChannelGroup] = []
    excluded: list[Excluded] = []
    for group, (reason, spared) in _named_apart(found, order):
        small = "at its smallest width" if group.n_units <= group.min_units else None
        if reason or small:
            excluded.append(Excluded.of(group, reason or str(small), spared and small is None))
        else:
            groups.append(group)
    return PrunableGroups(groups, excluded, traced, options)


def _named_apart(
    found: Sequence[tuple[ChannelGroup, Any]], order: Mapping[str, int]
) -> Iterator[tuple[ChannelGroup, Any]]:
    """The groups in execution order; those that share their first producer are numbered.

    Numbers follow from the layers that the channels reach, in execution order, and only for the same layers from the
    positions. Removing channels changes neither, so that a network that is traced again has the same names.
    """
    late = len(order)

    def place(entry: tuple[ChannelGroup, str | None]) -> Any:
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
    blocks: int  # channels j, j + width/blocks, j + 2·width/blocks, ... must go together
    min_units: int


def _convert(
    traced: Trace,
    host_group: Any,
    ignored: set[nn.Module],
    num_heads: Mapping[nn.Module, int],
    order: Mapping[str, int],
) -> tuple[list[ChannelGroup], str | None, bool]:
    """One Torch-Pruning group in our terms, the reason to leave it out, if there is one, and if that is only asked for.

    Channels that a split sends to different readers become groups of their own: only then is the cost a function
    of the widths.
    """
    graph, reasons, asked = traced.graph, list[str](), 0
    raw: list[_RawMember] = []
    for item in host_group:
        module = item.dep.target.module
        role: Role = "out" if graph.is_out_channel_pruning_fn(item.dep.handler) else "in"
        if role == "out" and not item.dep.target.outputs:
            reasons.append("produces the network's output")
        if module not in traced.names:  # concat, split, elementwise: no parameters of their own
            continue
        if role == "out" and module in ignored:
            reasons.append(f"{traced.names[module]} is in ignored_layers")
            asked += 1
        if isinstance(module, _REFUSED):
            reasons.append(f"{traced.names[module]} ({type(module).__name__}) mixes the channels: none can go exactly")
        if fixed := _computed(traced, module, role):
            reasons.append(fixed)
        if item.root_idxs is None or any(i is None for i in item.root_idxs):
            reasons.append(f"no index map reaches {traced.names[module]} (grouped-query attention)")
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
        reasons.append(problem)
    if not any(m.kind == "reader" for m in raw):
        reasons.append("nothing with weights reads it")
    groups = _split_by_signature(next((m.name for m in raw if m.kind == "producer"), root[0]), root, raw, units)
    return groups, reasons[0] if reasons else None, 0 < asked == len(reasons)


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
        ("producer" if role == "out" else "reader") if dense else "carrier",
        np.asarray(item.idxs, np.int64),
        np.asarray(item.root_idxs, np.int64),
        int(width or len(item.idxs)),
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
                members.append(Member(m.name, m.role, m.kind, m.channels[at >= 0], at[at >= 0], m.width))
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
