"""Our groups as Torch-Pruning's: what its importances, and any written for it, are called with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch_pruning as tp
from torch import Tensor, nn

from .groups import ChannelGroup, Dimension, Index, Member, PrunableGroups, Role
from .layer_pruners import GROUPED_PRUNERS, ParametrisedPruner, WholeGroupPruner, grouped_pruner

__all__ = ["GroupView", "HostGraph", "Selection", "by_unit", "group_items", "score_group"]


class HostGraph(tp.DependencyGraph):
    """What a group of Torch-Pruning asks its graph: the layers' names, widths and pruning functions.

    Nothing is traced; :meth:`build_dependency` and the search for groups are for subclasses.

    Args:
        model: the network.
        customized_pruners: pruning functions by type or by layer.
    """

    def __init__(self, model: nn.Module, customized_pruners: Mapping[Any, Any] | None = None) -> None:
        super().__init__()
        self._attach(model, customized_pruners)

    def _attach(self, model: nn.Module, customized_pruners: Mapping[Any, Any] | None) -> None:
        self.model, self.verbose = model, False
        for key, pruner in (customized_pruners or {}).items():
            self.register_customized_layer(key, pruner)
        for pruner in GROUPED_PRUNERS:
            self._out_channel_pruning_fn.add(pruner.prune_out_channels)
            self._in_channel_pruning_fn.add(pruner.prune_in_channels)
        self._module2name: dict[Any, str] = {module: name for name, module in model.named_modules()}
        self._layers: dict[str, Any] = dict(model.named_modules())
        self.module2node: dict[Any, Any] = {}
        self._param_to_name: dict[Any, str] = {}
        self.unwrapped_parameters: list[tuple[nn.Parameter, int]] = []

    def holder(self, name: str) -> Any:
        """The module, parameter or buffer of that name, as it is now."""
        module = self._layers.get(name)
        if module is not None:
            return module
        owner, _, leaf = name.rpartition(".")
        return getattr(self.model.get_submodule(owner), leaf)

    def node(self, dimension: Dimension) -> Any:
        """Torch-Pruning's node for a side of a module, or an axis of a tensor."""
        name, _, axis = dimension
        holder = self.holder(name)
        node = self.module2node.get(holder)
        if node is None or (axis is not None and node.pruning_dim != axis):
            known, node = node, tp.dependency.Node(holder, None, name)
            if isinstance(holder, Tensor):
                node.type = self.ops.OPTYPE.PARAMETER  # buffers, too
                node.pruning_dim = -1 if axis is None else axis
            if known is None:
                self.module2node[holder] = node
                self._module2name.setdefault(holder, name)
        return node

    def function(self, dimension: Dimension) -> Any:
        """The pruning function by which importances know what happens to a dimension.

        Parametrised layers have one of ours; they are shown as the plain layers that they are to an importance. So are
        the outputs of convolutions with one input per group; importances would not find their inputs in the weight.
        Outputs of transposed ones are for :func:`score_group`.
        """
        name, role, _ = dimension
        holder = self.holder(name)
        pruner = self.plain_pruner(holder)
        rows = isinstance(pruner, WholeGroupPruner) and role == "out" and not holder.transposed
        if isinstance(pruner, ParametrisedPruner) or rows:
            kind = self.ops.OPTYPE.LINEAR if isinstance(holder, nn.Linear) else self.ops.OPTYPE.CONV
            pruner = self.REGISTERED_PRUNERS[kind]
        return pruner.prune_out_channels if role == "out" else pruner.prune_in_channels

    def plain_pruner(self, module: Any) -> Any:
        """The pruning functions of a module, a parameter or a buffer."""
        if isinstance(module, Tensor):
            return self.REGISTERED_PRUNERS[self.ops.OPTYPE.PARAMETER]
        if {module, type(module)}.isdisjoint(self.CUSTOMIZED_PRUNERS):
            if (ours := grouped_pruner(module)) is not None:
                return ours
        return self.CUSTOMIZED_PRUNERS.get(module) or tp.DependencyGraph.get_pruner_of_module(self, module)

    def get_pruner_of_module(self, module: Any) -> Any:
        """The same, by Torch-Pruning's name."""
        return self.plain_pruner(module)

    def get_out_channels(self, module_or_node: Any) -> int | None:
        """Present width of a module, or of a tensor along the axis of its node."""
        return self._width(module_or_node, "out")

    def get_in_channels(self, module_or_node: Any) -> int | None:
        """Present input width of a module, or of a tensor along the axis of its node."""
        return self._width(module_or_node, "in")

    def _width(self, module_or_node: Any, role: Role) -> int | None:
        node = module_or_node if isinstance(module_or_node, tp.dependency.Node) else None
        module = module_or_node if node is None else node.module
        if isinstance(module, Tensor):
            node = self.module2node[module] if node is None else node
            return int(module.shape[node.pruning_dim])
        pruner = self.plain_pruner(module)
        if isinstance(module, nn.LayerNorm):
            pruner.pruning_dim = -1  # Torch-Pruning's functions share one object, and it remembers the last axis
        width = pruner.get_out_channels(module) if role == "out" else pruner.get_in_channels(module)
        return None if width is None else int(width)


Selection = Sequence[tuple[ChannelGroup, Index, Index]]
"""Groups, chosen units of each, shape (n,), ascending, and the root channels of these units, shape (n, s)."""


class GroupView(tp.dependency.Group):
    """A group of Torch-Pruning, to be looked at."""

    def __init__(self, graph: HostGraph, items: Iterable[Any]) -> None:
        super().__init__()
        self._DG = graph
        self._group = list(items)

    def prune(self, idxs: Any = None, record_history: bool = True) -> None:
        """Not for this one.

        Raises:
            TypeError: always.
        """
        raise TypeError("this group is there to be scored; prune one of pruner.step(interactive=True)")


def group_items(graph: HostGraph, root: Dimension, root_idxs: Index, chosen: Selection) -> list[Any]:
    """The items of a group of Torch-Pruning, the root first, then all members in execution order.

    Of every item local channel ``idxs[k]`` belongs to root channel ``root_idxs[k]``. Indices ascend, so that
    importances that sort them do not unpair the two. Within a unit of several root channels the positions of a member
    are dealt out in ascending order.

    Args:
        graph: names and pruning functions.
        root: where the group starts.
        root_idxs: its channels, shape (C,), ascending.
        chosen: the units that take part.
    """
    source = graph.node(root)
    trigger = graph.function(root)
    items = [_item(graph, trigger, trigger, source, source, root_idxs, root_idxs)]
    parts: dict[Dimension, list[tuple[Index, Index]]] = {}
    for group, units, roots in chosen:
        for member in group.members:
            channels = by_unit(member, group)[units]
            dealt = np.arange(channels.shape[1]) * roots.shape[1] // channels.shape[1]
            pair = channels.ravel(), roots[:, dealt].ravel()
            parts.setdefault(member.dimension, []).append(pair)
    for dimension, pairs in parts.items():
        if dimension == root:
            continue
        idxs, of_root = np.concatenate(pairs, axis=1)
        order = np.argsort(idxs, kind="stable")
        target, handler = graph.node(dimension), graph.function(dimension)
        items.append(_item(graph, trigger, handler, source, target, idxs[order], of_root[order]))
    return items


def by_unit(member: Member, group: ChannelGroup) -> Index:
    """Positions of a member per unit of its group, ascending, shape (U, m)."""
    return member.channels[np.lexsort((member.channels, member.units))].reshape(group.n_units, -1)


def _item(graph: HostGraph, trigger: Any, handler: Any, source: Any, target: Any, idxs: Index, roots: Index) -> Any:
    dependency = tp.dependency.Dependency(trigger, handler, source, target)
    item = tp._helpers.GroupItem(dependency, idxs.tolist())
    item.root_idxs = roots.tolist()
    return item


def score_group(groups: PrunableGroups, group: ChannelGroup) -> tuple[GroupView, Index, Index]:
    """One of our groups as Torch-Pruning's, to be scored by any of its importances.

    Groups that a split made of one layer are scored together, as Torch-Pruning does. Root channels are numbered 0, 1,
    ..., C − 1, also where some of the root's are in no group: an importance that scatters into a vector of the length
    of the group works.

    Args:
        groups: where it is from.
        group: the group.

    Returns:
        The ``tp.Group`` of C root channels; which of them are of ``group``, and their units, both of shape (width,).

    Example:
        >>> import torch
        >>> from tp_importance import prunable_groups
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3))
        >>> groups = prunable_groups(net, torch.randn(1, 3, 8, 8))
        >>> view, channels, units = score_group(groups, groups["0"])
        >>> [item.dep.handler.__name__ for item in view], units.tolist()
        (['prune_out_channels', 'prune_out_channels', 'prune_in_channels'], [0, 1, 2, 3, 4, 5, 6, 7])
        >>> tp.importance.LAMPImportance()(view).shape
        torch.Size([8])
    """
    graph = HostGraph(groups.trace.model, groups.options.customized_pruners)
    together = [other for other in groups if other.root == group.root]
    channels = np.sort(np.concatenate([other.root_channels for other in together]))
    chosen: list[tuple[ChannelGroup, Index, Index]] = []
    for other in together:
        order = np.lexsort((other.root_channels, other.root_units))
        roots = np.searchsorted(channels, other.root_channels[order]).reshape(other.n_units, -1)
        chosen.append((other, np.arange(other.n_units), roots))
    items = group_items(graph, group.root_dimension, channels, chosen)
    items[0].root_idxs = list(range(len(channels)))
    for item in items:
        layer = item.dep.target.module
        if grouped_pruner(layer) is not None and layer.transposed and graph.is_out_channel_pruning_fn(item.dep.handler):
            item.dep.target = tp.dependency.Node(_in_rows(layer), None, item.dep.target.name)
            item.dep.handler = graph.REGISTERED_PRUNERS[graph.ops.OPTYPE.CONV].prune_out_channels
    return GroupView(graph, items), np.searchsorted(channels, group.root_channels), group.root_units


def _in_rows(layer: Any) -> nn.Module:
    """A grouped transposed convolution as a plain one with a row per output: what importances take for its filters."""
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[layer.weight.dim() - 3]

    def rows(tensor: Tensor) -> Tensor:
        blocks = tensor.view(layer.groups, -1, *tensor.shape[1:]).transpose(1, 2)
        return blocks.reshape(layer.out_channels, -1, *tensor.shape[2:])

    shape = layer.in_channels // layer.groups, layer.out_channels, layer.kernel_size
    twin = kind(*shape, bias=layer.bias is not None, device="meta")
    twin.weight, twin.bias = nn.Parameter(rows(layer.weight.detach())), layer.bias
    if layer.weight.grad is not None:
        twin.weight.grad = rows(layer.weight.grad)
    return twin
