"""A stand-in for Torch-Pruning's dependency graph that answers from our groups."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from torch import Tensor, nn

from ..core.listing import listed
from ..core.processes import levels_up
from .cuts import cuts_of, scalings_of
from .discovery import prunable_groups
from .groups import ChannelGroup, Dimension, Excluded, Index, Member, PrunableGroups, Verifier
from .history import PruningHistory, units_of
from .host_group import GroupView, HostGraph, by_unit, group_items
from .layer_pruners import LayerPruners, channel_pruners
from .narrowing import narrowed
from .stand_ins import Channels, ChannelsPruner, InBlocks
from .surgery import Cutter, checked_units

__all__ = ["LabelGraph", "LabelGroup"]

_ROOTS = (tp.ops.TORCH_CONV, tp.ops.TORCH_LINEAR)


class LabelGroup(GroupView):
    """A group of Torch-Pruning that is removed as a whole, from every layer it is in.

    Its items are there to be looked at: :meth:`prune` removes the units that the group stands for, wherever their
    channels are by then.

    Attributes:
        units: what goes, per name of one of our groups: units, numbered as when the graph was built.
    """

    _DG: LabelGraph

    def __init__(self, graph: LabelGraph, items: Sequence[Any], units: Mapping[str, Index]) -> None:
        super().__init__(graph, items)
        self.units = dict(units)

    def prune(self, idxs: Any = None, record_history: bool = True) -> None:
        """Remove the channels of the group.

        Args:
            idxs: remove these channels of the first layer instead.
            record_history: note the removal in ``pruning_history()``.

        Raises:
            ValueError: if channels are gone already, or too few would be left.
        """
        if idxs is not None:
            root = self[0].dep
            self._DG.get_pruning_group(root.target.module, root.handler, idxs).prune(record_history=record_history)
            return
        self._DG.remove(self, record_history)

    def __setitem__(self, k: int, v: Any) -> None:
        raise TypeError("the items of this group cannot be replaced: its channels go together, from every layer")


@dataclass(frozen=True)
class _Host:
    """Groups of ours that Torch-Pruning sees as one, and the module where it starts.

    Its channels are ranked in blocks of equal size: channel j of every block belongs to one unit.
    """

    names: tuple[str, ...]
    root: Any
    blocks: int


class LabelGraph(HostGraph):
    """Answers what Torch-Pruning's pruners ask their ``DependencyGraph``, from :func:`~tp_importance.prunable_groups`.

    A group that is left out is not offered; :attr:`excluded` says why. Groups behind a split of one layer, which
    Torch-Pruning takes as one, are one here, too. Where a group covers no layer's output as a whole, it starts at a
    module that stands for its channels.

    Args:
        ignored_layers: modules, parameters or types that must keep their outputs.
        num_heads: heads per projection, as in Torch-Pruning.
        verify: compare masked and pruned copies, see :func:`~tp_importance.prunable_groups`.
        allow_stale: also offer channels that layers read in training mode only.
        progress: show progress bars; by default in a terminal.
        out_channel_groups: the pruner's, of the blocks in which it ranks channels; stand-ins are added.

    Attributes:
        groups: our groups of the network as it is now.
        direct_history: all that was cut, to be repeated by :func:`.graph.history.repeat_cuts` on a network that nobody
            has traced.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> graph = LabelGraph().build_dependency(net, torch.randn(1, 3, 8, 8))
        >>> group = graph.get_pruning_group(net[0], tp.prune_conv_out_channels, [2, 5])
        >>> [item.idxs for item in group]
        [[2, 5], [2, 5], [2, 5]]
        >>> group.prune()
        >>> net[3].in_channels, graph.pruning_history(), [e.reason for e in graph.excluded]
        (6, [['0', True, [2, 5]]], ["produces the network's output"])
    """

    groups: PrunableGroups

    def __init__(
        self,
        *,
        ignored_layers: Sequence[nn.Module | nn.Parameter | type] | None = None,
        num_heads: Mapping[nn.Module, int] | None = None,
        verify: bool | Verifier = True,
        allow_stale: bool = False,
        progress: bool | None = None,
        out_channel_groups: dict[Any, int] | None = None,
    ) -> None:
        tp.DependencyGraph.__init__(self)
        self._ranked = {} if out_channel_groups is None else out_channel_groups
        self._stand_ins: dict[type, Any] = {}
        self.direct_history: list[list[Any]] = []
        self._heads = dict(num_heads or {})
        self._blocks: dict[Any, int] = {}
        self._hosts: list[_Host] = []
        self._first: dict[nn.Module, Any] = {}
        self._discover = partial(
            prunable_groups,
            ignored_layers=ignored_layers,
            num_heads=num_heads,
            verify=verify,
            allow_stale=allow_stale,
            progress=progress,
        )

    @property
    def excluded(self) -> list[Excluded]:
        """The groups that are not offered, and why."""
        return self.groups.excluded

    def build_dependency(
        self,
        model: nn.Module,
        example_inputs: Any,
        forward_fn: Callable[[nn.Module, Any], Any] | None = None,
        output_transform: Callable[[Any], Any] | None = None,
        unwrapped_parameters: Sequence[tuple[nn.Parameter, int]] | None = None,
        customized_pruners: Mapping[Any, Any] | None = None,
        ignored_layers: Sequence[nn.Module] | None = None,
        ignored_params: Sequence[nn.Parameter] | None = None,
        verbose: bool = True,
    ) -> LabelGraph:
        """Find the groups; see :func:`~tp_importance.prunable_groups` for the arguments.

        Args:
            model: the network; neither its weights nor its modes are changed.
            example_inputs: tensor, tuple or dict, batch dimension first.
            forward_fn: how to call the network.
            output_transform: applied to its output.
            unwrapped_parameters: pairs of a parameter and the axis to prune.
            customized_pruners: pruning functions by type or layer.
            ignored_layers: more layers that must keep their outputs.
            ignored_params: parameters that must not be cut.
            verbose: for Torch-Pruning; not used.

        Returns:
            self.

        Warns:
            UserWarning: if no group can be pruned, with the reasons.
        """
        given = self._discover.keywords["ignored_layers"]
        self.groups = self._discover(
            model,
            example_inputs,
            ignored_layers=[*(given or ()), *(ignored_layers or ()), *(ignored_params or ())],
            unwrapped_parameters=unwrapped_parameters,
            customized_pruners=customized_pruners,
            forward_fn=forward_fn,
            output_transform=output_transform,
        )
        if not len(self.groups):
            warnings.warn(self.groups.nothing_left(), stacklevel=levels_up())
        self._first.clear()  # of a network seen before
        for host in self._hosts:
            self._ranked.pop(host.root, None)
        self._attach(model, channel_pruners(model, customized_pruners))
        self._cutter = Cutter(model, LayerPruners(model, customized_pruners))
        self.unwrapped_parameters = list(unwrapped_parameters or ())
        self.ignored_params = list(ignored_params or ())
        self._numbers = {group.name: np.arange(group.n_units) for group in self.groups}
        stand_in = ChannelsPruner()
        self._stand_ins[Channels] = stand_in
        self._out_channel_pruning_fn.add(stand_in.prune_out_channels)
        for module, name in self._module2name.items():
            if name and self.plain_pruner(module) is not self.REGISTERED_PRUNERS[self.ops.OPTYPE.ELEMENTWISE]:
                self.node((name, "out", None))
        for group in self.groups:
            for member in group.members:
                self.node(member.dimension)
        self._hosts = self._arranged()
        # of a packed projection with heads, pruners rank the inputs of the layer behind: one block per head
        self._blocks = {host.root: self._heads.get(host.root, host.blocks) for host in self._hosts}
        # pruners ask the layers of the network themselves, but no stand-in
        self._ranked |= {h.root: h.blocks for h in self._hosts if isinstance(h.root, Channels) and h.blocks > 1}
        return self

    # ------------------------------------------------------------------ what the pruners ask

    def get_all_groups(
        self, ignored_layers: Sequence[Any] = (), root_module_types: Sequence[type] = _ROOTS
    ) -> Iterator[LabelGroup]:
        """All groups with all their channels, those first that the network computes first; named attention is last.

        Args:
            ignored_layers: leave out groups that make outputs of these modules.
            root_module_types: only groups that make outputs of a module of one of these types.
        """
        # Torch-Pruning re-roots attention at the layer behind; of groups with one root it takes the last
        for host in sorted(self._hosts, key=lambda h: h.root in self._heads):
            groups = [self.groups[name] for name in host.names]
            makers = [self.holder(m.name) for group in groups for m in group.members if m.role == "out"]
            ignored = any(maker is layer for maker in makers for layer in ignored_layers)
            if not ignored and any(isinstance(maker, tuple(root_module_types)) for maker in makers):
                yield self._whole(host, groups)

    def get_pruning_group(self, module: Any, pruning_fn: Any, idxs: Any) -> LabelGroup:
        """Everything that goes with some channels of a layer.

        Channels that can only go together with others, as those of a grouped convolution, take these with them.

        Args:
            module: the layer, or a parameter.
            pruning_fn: whether its outputs or its inputs go.
            idxs: the channels.

        Raises:
            ValueError: if channels cannot be pruned, or their units hold all that is left of a group.
        """
        wanted = np.unique(np.atleast_1d(np.asarray(torch.as_tensor(idxs, device="cpu").cpu(), np.int64)))
        if isinstance(module, Channels):
            return self._of_stand_in(module, wanted)
        sides = self._sides(module, pruning_fn)
        name, width = self._name(module), sides[0][1].width
        if len(wanted) and not 0 <= wanted[0] <= wanted[-1] < width:
            raise ValueError(f"{name} has channels 0..{width - 1}; {listed(wanted)} cannot be pruned")
        chosen, closed = [], []
        for group, member in sides:
            units = np.unique(member.units[np.isin(member.channels, wanted)])
            if len(units):
                rows = by_unit(member, group)[units]
                self._check_split(group, name, wanted, rows, units)
                chosen.append((group, units, rows))
                closed.append(rows.ravel())
        channels = np.unique(np.concatenate([*closed, wanted[:0]]))
        missing = np.setdiff1d(wanted, channels)
        if len(missing):
            raise ValueError(
                f"channels {listed(missing)} of {name} are in no group that can be pruned{self._why(name)}"
            )
        return self._group(sides[0][1].dimension, channels, chosen)

    def check_pruning_group(self, group: Any) -> bool:
        """Whether enough is left once a group is pruned."""
        if not isinstance(group, LabelGroup):
            return super().check_pruning_group(group)
        left = {name: self.groups[name].n_units - len(units) for name, units in group.units.items()}
        return all(n >= self.groups[name].min_units for name, n in left.items())

    def get_pruner_of_module(self, module: Any) -> Any:
        """The pruning functions of a module; they also say in how many blocks its channels are ranked."""
        pruner = self.plain_pruner(module)
        if isinstance(module, Tensor):
            return pruner
        blocks = self._blocks.get(module, 1)
        if (pruner.get_in_channel_groups(module), pruner.get_out_channel_groups(module)) == (1, blocks):
            return pruner
        return InBlocks(pruner, blocks)

    def load_pruning_history(self, pruning_history: Sequence[Any]) -> None:
        """Repeat a history on the network, which must be as it was when the history began.

        Args:
            pruning_history: entries ``[name, is_out, channels]``, from here or from Torch-Pruning's own graph.

        Raises:
            ValueError: if an entry is none, or if channels split a unit or are in no group; nothing is changed then.
        """
        entries = list(pruning_history)
        removed = {name: np.unique(units) for name, units in units_of(entries, self.groups).items()}
        self._remove(removed)
        self._pruning_history += entries

    # ------------------------------------------------------------------ removal

    def remove(self, group: LabelGroup, record_history: bool = True) -> None:
        """Cut the channels of a group from the network, and bring all other groups up to date.

        Args:
            group: from :meth:`get_pruning_group` or :meth:`get_all_groups`; it may be older than other removals.
            record_history: note it in the history.

        Raises:
            ValueError: if channels are gone already, or too few would be left.
        """
        removed: dict[str, Index] = {}
        for name, units in group.units.items():
            removed[name] = np.flatnonzero(np.isin(self._numbers[name], units))
            if len(removed[name]) < len(units):
                raise ValueError(f"group {name} was pruned meanwhile, and lost channels that were to go now")
        if not removed:
            return
        entry = self._entry(group, removed)
        self._remove(removed)
        if record_history:
            self._pruning_history.append(entry)

    def _remove(self, removed: Mapping[str, Index]) -> None:
        """Cut units, as they are numbered now."""
        tensors = {n: self.holder(n) for n in {m.name for name in removed for m in self.groups[name].members}}
        plan = checked_units(self.groups, {name: at.tolist() for name, at in removed.items()})
        cuts = cuts_of(plan, self.model, self._cutter.pruners)
        self._cutter.make(cuts, scalings_of(self.groups, cuts), gradients=True)
        self.groups = narrowed(self.groups, removed)
        for name, at in removed.items():
            self._numbers[name] = np.delete(self._numbers[name], at)
        for host in self._hosts:
            if isinstance(host.root, Channels):
                host.root.width = self.groups[host.names[0]].width
        for name, old in tensors.items():
            if isinstance(old, Tensor):
                self._replace(name, old)
        self.direct_history += PruningHistory.entries_of(cuts)

    def _replace(self, name: str, old: Tensor) -> None:
        new, node = self.holder(name), self.module2node.pop(old)
        node.module = new
        self.module2node[new] = node
        self._module2name[new] = self._module2name.pop(old)
        self.unwrapped_parameters = [(new if p is old else p, axis) for p, axis in self.unwrapped_parameters]

    def _entry(self, group: LabelGroup, removed: Mapping[str, Index]) -> list[Any]:
        """History of a removal: at the root if it is a layer, else at the first layer that makes the channels."""
        root = group[0].dep
        name = self._module2name.get(root.target.module, "")
        role = "out" if self.is_out_channel_pruning_fn(root.handler) else "in"
        first = self.groups[next(iter(removed))]
        if isinstance(root.target.module, Channels):
            maker = next((m for m in first.members if m.axis is None and m.role == "out"), first.members[0])
            name, role = maker.name, maker.role
        found = [
            m.positions(at)
            for g, at in removed.items()
            for m in self.groups[g].members
            if (m.name, m.role) == (name, role)
        ]
        return [name, role == "out", np.unique(np.concatenate(found)).tolist()]

    # ------------------------------------------------------------------ groups of ours as groups of Torch-Pruning

    def plain_pruner(self, module: Any) -> Any:
        """The pruning functions that a module had at first."""
        if isinstance(module, Tensor):
            return super().plain_pruner(module)
        if module not in self._first:
            self._first[module] = self._stand_ins.get(type(module)) or super().plain_pruner(module)
        return self._first[module]

    def _whole(self, host: _Host, groups: Sequence[ChannelGroup]) -> LabelGroup:
        if isinstance(host.root, Channels):
            return self._of_stand_in(host.root, np.arange(host.root.width))
        name = self._module2name[host.root]
        members = [(g, m) for g in groups if (m := g.member(name, "out")) is not None]
        chosen = [(g, np.arange(g.n_units), by_unit(m, g)) for g, m in members]
        return self._group((name, "out", None), np.arange(members[0][1].width), chosen)

    def _of_stand_in(self, module: Channels, wanted: Index) -> LabelGroup:
        group, name = self.groups[module.group], self._name(module)
        if len(wanted) and not 0 <= wanted[0] <= wanted[-1] < module.width:
            raise ValueError(f"{name} are 0..{module.width - 1}; {listed(wanted)} cannot be pruned")
        units = np.unique(wanted % group.n_units)
        rows = units[:, None] + group.n_units * np.arange(group.unit_size)
        self._check_split(group, name, wanted, rows, units)
        return self._group((name, "out", None), np.sort(rows.ravel()), [(group, units, rows)] if len(units) else [])

    def _group(
        self, root: Dimension, channels: Index, chosen: Sequence[tuple[ChannelGroup, Index, Index]]
    ) -> LabelGroup:
        units = {group.name: self._numbers[group.name][units] for group, units, _ in chosen}
        return LabelGroup(self, group_items(self, root, channels, chosen), units)

    def _check_split(self, group: ChannelGroup, name: str, wanted: Index, rows: Index, units: Index) -> None:
        """Refuse channels whose units are all that is left of a group, if less was asked for."""
        split = ~np.isin(rows, wanted).all(1)
        if split.any() and group.n_units - len(units) < group.min_units:
            raise ValueError(
                f"channels {listed(np.intersect1d(rows, wanted))} of {name} split units of group {group.name}: "
                f"{listed(rows[split][0])}, say, can only go together, and with all such units fewer than "
                f"{group.min_units} of {group.n_units} units would be left"
            )

    def _sides(self, module: Any, pruning_fn: Any) -> list[tuple[ChannelGroup, Member]]:
        """The groups with channels on one side of a layer, and their members there."""
        name, pruner = self._name(module), self.plain_pruner(module)
        if not (self.is_out_channel_pruning_fn(pruning_fn) or self.is_in_channel_pruning_fn(pruning_fn)):
            raise ValueError(f"{pruning_fn} is no pruning function that this network has layers for")
        role = "out" if self.is_out_channel_pruning_fn(pruning_fn) else "in"
        one = pruner.prune_in_channels == pruner.prune_out_channels
        found = [(g, m) for g in self.groups for m in g.members if m.name == name and (one or m.role == role)]
        if isinstance(module, Tensor):
            found = [(g, m) for g, m in found if m.axis == self.module2node[module].pruning_dim]
        if not found:
            raise ValueError(f"{name} has no {role}put channels that can be pruned{self._why(name)}")
        return [(g, m) for g, m in found if m.role == found[0][1].role]

    def _name(self, module: Any) -> str:
        name = self._module2name.get(module)
        if name is None:
            raise ValueError(f"{type(module).__name__} is no layer of {type(self.model).__name__}, or was replaced")
        return name

    def _why(self, name: str) -> str:
        reasons = [f"{e.name}: {e.reason}" for e in self.excluded if name in (e.name, *e.layers)]
        return f" ({'; '.join(reasons)})" if reasons else ""

    def _arranged(self) -> list[_Host]:
        """Which of our groups make one of Torch-Pruning's, and where it starts: at a layer of which all outputs are in.

        A layer that all of a group's channels are outputs of, if there is one; else several groups together if they are
        all outputs of one layer; else something that stands for the channels.
        """
        hosts: dict[str, _Host] = {}

        def host(names: Sequence[str], makers: Sequence[str]) -> None:
            family = [self.groups[name] for name in names if name not in hosts]
            for maker in makers:
                blocks = self._blocks_at(maker, family)
                if blocks:
                    found = _Host(tuple(g.name for g in family), self.holder(maker), blocks)
                    hosts.update(dict.fromkeys(found.names, found))
                    return

        for group in self.groups:
            host([group.name], [m.name for m in group.producers])
        made: dict[str, list[str]] = defaultdict(list)
        for group in self.groups:
            for member in group.producers if group.name not in hosts else ():
                made[member.name].append(group.name)
        for maker, names in made.items():
            host(names, [maker])
        for group in self.groups:
            if group.name not in hosts:  # importances that score no such layer take the first producer's channels
                host([group.name], [m.name for m in group.members if m.width == group.width])
            if group.name not in hosts:
                stand_in = Channels(group)
                self._layers[f"the channels of {group.name}"] = stand_in
                self.node((f"the channels of {group.name}", "out", None))
                hosts[group.name] = _Host((group.name,), stand_in, group.unit_size)
        return list({id(hosts[name]): hosts[name] for name in self.groups.names}.values())

    def _blocks_at(self, name: str, family: Sequence[ChannelGroup]) -> int | None:
        """In how many blocks the outputs of a layer are ranked; ``None`` if these groups cannot start there."""
        members = [m for g in family if (m := g.member(name, "out")) is not None and m.axis is None]
        if not family or len(members) < len(family) or self.get_out_channels(self.holder(name)) is None:
            return None
        rows = [by_unit(m, g) for m, g in zip(members, family, strict=True)]
        size, width = rows[0].shape[1], members[0].width
        if any(r.shape[1] != size for r in rows):
            return None
        channels = np.concatenate(rows)
        if not np.array_equal(np.sort(channels.ravel()), np.arange(width)):
            return None
        in_step = (channels == channels[:, :1] + np.arange(size) * (width // size)).all()
        return size if in_step else None
