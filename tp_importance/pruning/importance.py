"""Data-driven importances: statistics once, then scores for Torch-Pruning and curves for our allocators."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import numpy as np
import torch
import torch_pruning as tp
from torch import Tensor, nn

from ..allocation.curves import Curve
from ..allocation.greedy import greedy_path
from ..allocation.space import WidthSpace
from ..core.forward import ForwardFn
from ..core.loaders import WholeBatches
from ..core.progress import shown
from ..core.types import Floats
from ..errors import NotCollectedError, StaleStatisticsError
from ..graph.agreement import UnitsAt, agrees, units_at
from ..graph.cost import CostModel
from ..graph.discovery import prunable_groups
from ..graph.groups import PrunableGroups, Role
from ..graph.host_group import HostGraph
from ..statistics.labels import LabelFn
from ..statistics.observe import Observed, Watch, observe

__all__ = ["StatisticalImportance"]


class StatisticalImportance(tp.importance.Importance, abc.ABC):
    """An importance that looks at data once and then answers for any budget, pruner and host.

    A subclass says what to watch (:meth:`watches`) and how to value it (:meth:`value`); :meth:`alongside` and
    :meth:`before_batch` are there for what looks at more than single layers. As a Torch-Pruning
    importance the score of a channel is its *rank* in one budget-independent greedy sequence (:func:`greedy_path`
    on MACs), in (0, 1], larger is better: distinct for all units above the floor, so that neither local nor
    ``global_pruning=True`` meets ties; the channels of one unit share their rank.
    Groups that cannot be pruned safely get ``None``, which Torch-Pruning skips.
    """

    needs_labels = True
    """Whether batches must have labels; without, all samples count as class 0."""
    needs_gradients = False
    """Whether the pass builds the graph, for watches that call :func:`torch.autograd.grad`."""
    default_allocator = "greedy"
    """Where widths come from if nobody says; ``"uniform"`` if losses compare within a group only."""

    @property
    def name(self) -> str:
        """What reports call it."""
        return type(self).__name__

    @property
    def least_samples(self) -> int:
        """Samples a batch needs; a last batch of fewer is taken together with the one before it."""
        return 1

    def __init__(self, *, classes: Sequence[int] | None = None) -> None:
        self.classes = None if classes is None else list(classes)
        self.observed: Observed | None = None
        self._groups: PrunableGroups | None = None
        self._cached_curves: dict[str, Curve] = {}
        self._ranks: dict[str, Floats] = {}
        self._known_units: tuple[PrunableGroups, UnitsAt] | None = None

    @abc.abstractmethod
    def watches(self, groups: PrunableGroups) -> list[Watch]:
        """Make fresh accumulators, and say which layers feed them.

        Args:
            groups: the groups to be valued.

        Returns:
            One :class:`~tp_importance.statistics.observe.Watch` per layer: its ``fn(input, output, labels)`` is called
            for every batch. What it sums up, the importance keeps.
        """

    @abc.abstractmethod
    def value(self, groups: PrunableGroups) -> dict[str, Curve]:
        """Loss curve of every group from what the accumulators hold; called once, after the pass.

        Args:
            groups: the groups that were watched.

        Returns:
            A :class:`~tp_importance.allocation.curves.Curve` per group name: ``loss[c]`` for c units that are left,
            shape (U + 1,), and ``order``, the units in the order in which they go, shape (U,). Losses of different
            groups must compare, or ``default_allocator`` be ``"uniform"``.
        """

    def alongside(self, groups: PrunableGroups, forward_fn: ForwardFn | None) -> AbstractContextManager[None]:
        """What is to be open during the pass: a context manager.

        Args:
            groups: the groups that are watched.
            forward_fn: how the model is called.
        """
        return nullcontext()

    def before_batch(self, labels: Tensor) -> None:
        """Called before each batch of the pass.

        Args:
            labels: as watches get them, shape (N,); of positions, shape (N, T), where padding is known.
        """

    def collect(
        self,
        model: nn.Module,
        example_inputs: Any,
        loader: Iterable[Any],
        *,
        groups: PrunableGroups | None = None,
        ignored_layers: Sequence[nn.Module | nn.Parameter | type] | None = None,
        forward_fn: ForwardFn | None = None,
        label_fn: LabelFn | None = None,
        progress: bool | None = None,
    ) -> Self:
        """Collect the statistics in one pass over ``loader``; the model is not changed.

        Args:
            model: the network to be pruned.
            example_inputs: tensor, tuple or dict, batch dimension first.
            loader: re-iterable of labelled batches.
            groups: groups of this model, if they are at hand already.
            ignored_layers: as in Torch-Pruning; only without ``groups``.
            forward_fn: ``forward_fn(model, batch)``, also called with ``example_inputs``.
            label_fn: ``label_fn(batch)``.
            progress: show a progress bar; by default in a terminal.

        Returns:
            self, ready to be passed to Torch-Pruning as ``importance=``.

        Raises:
            TracingError: if the network cannot be traced.
            ValueError: for an empty loader, missing or malformed labels, non-finite activations, or no prunable group.
        """
        if groups is None:
            groups = prunable_groups(
                model, example_inputs, ignored_layers=ignored_layers, forward_fn=forward_fn, progress=progress
            )
        groups.require_some()
        if self.least_samples > 1:
            loader = WholeBatches(loader, self.least_samples)
        with shown(progress):
            observed, curves = self._run(model, loader, groups, forward_fn, label_fn)
        self.observed, self._groups, self._cached_curves, self._ranks = observed, groups, curves, {}
        return self

    def _run(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        groups: PrunableGroups,
        forward_fn: ForwardFn | None,
        label_fn: LabelFn | None,
    ) -> tuple[Observed | None, dict[str, Curve]]:
        """The pass over the data, and what follows from it."""
        watches = self.watches(groups)
        with self.alongside(groups, forward_fn):
            observed = observe(
                model,
                loader,
                watches,
                classes=self.classes,
                forward_fn=forward_fn,
                label_fn=label_fn,
                need_labels=self.needs_labels,
                before_batch=self.before_batch,
                gradients=self.needs_gradients,
            )
        return observed, self.value(groups)

    @property
    def groups(self) -> PrunableGroups:
        """Groups the statistics belong to.

        Raises:
            NotCollectedError: before :meth:`collect`.
        """
        if self._groups is None:
            name = type(self).__name__
            raise NotCollectedError(
                f"{name} has no statistics yet; call {name}(...).collect(model, example_inputs, loader)"
            )
        return self._groups

    def curves(self, groups: PrunableGroups | None = None) -> dict[str, Curve]:
        """Value curve of every group.

        Args:
            groups: groups of the model as it is now; checked against those the statistics belong to.

        Raises:
            NotCollectedError: before :meth:`collect`.
            StaleStatisticsError: if widths changed since.
        """
        for group in groups or ():
            known = self.groups.widths.get(group.name)
            if known != group.width:
                raise StaleStatisticsError(_stale(group.name, known, group.width))
        self.groups  # noqa: B018 - raises before collect
        return self._cached_curves

    @property
    def constant_units(self) -> dict[str, list[int]]:
        """Units that did not vary on the data, per group that has any."""
        return {name: c.constant.tolist() for name, c in self.curves().items() if len(c.constant)}

    @torch.no_grad()
    def __call__(self, group: Any) -> Tensor | None:
        """Scores of a ``tp.Group``, shape (len(group[0].idxs),), float32; ``None`` for a group to be left alone.

        Raises:
            NotCollectedError: before :meth:`collect`.
            StaleStatisticsError: if the layer has another width than when the statistics were collected.
        """
        groups, graph = self.groups, group._DG
        if not self._ranks:
            self._ranks = self._rank(groups)
        item = _first_layer(group)
        node = item.dep.target
        name = graph._module2name.get(node.module)
        role: Role = "out" if graph.is_out_channel_pruning_fn(item.dep.handler) else "in"
        width = graph.get_out_channels(node) if role == "out" else graph.get_in_channels(node)
        score = np.full(width or 0, np.nan)
        for ours in groups:
            member = ours.member(str(name), role)
            if member is None:
                continue
            if member.width != width:
                raise StaleStatisticsError(_stale(str(name), member.width, width))
            score[member.channels] = self._ranks[ours.name][member.units]
        chosen = score[np.asarray(item.idxs, np.int64)] if len(score) else score
        if item is not group[0]:
            place = {root: i for i, root in enumerate(group[0].idxs)}
            chosen, found = np.full(len(place), np.nan), chosen
            chosen[[place[root] for root in item.root_idxs]] = found
        if not len(chosen) or np.isnan(chosen).any():
            return None
        theirs = isinstance(graph, tp.DependencyGraph) and not isinstance(graph, HostGraph)
        if theirs and not agrees(group, groups, self._units_at(groups)):
            return None  # the host would cut what does not belong together
        parameter = next(iter(node.module.parameters()), None) if isinstance(node.module, nn.Module) else node.module
        return torch.tensor(chosen, dtype=torch.float32, device=None if parameter is None else parameter.device)

    def _units_at(self, groups: PrunableGroups) -> UnitsAt:
        if self._known_units is None or self._known_units[0] is not groups:
            self._known_units = (groups, units_at(groups))
        return self._known_units[1]

    def _rank(self, groups: PrunableGroups) -> dict[str, Floats]:
        """Step of the greedy sequence at which a unit comes in, as a fraction; the floor is on top."""
        cost = CostModel.from_groups(groups)
        total = int(cost.full.sum())
        ranks = {g.name: np.ones(g.n_units) for g in groups}
        for name, curve in self._cached_curves.items():  # floor units: distinct, and above every step
            floor = groups[name].min_units
            ranks[name][curve.order[len(curve.order) - floor :]] = 1.0 - np.arange(floor)[::-1] / (2 * total)
        for step, (g, units) in enumerate(greedy_path(self._cached_curves, cost, WidthSpace.of(groups.groups))):
            curve = self._cached_curves[cost.names[g]]
            ranks[cost.names[g]][curve.order[len(curve.order) - units]] = (total - step) / (total + 1)
        return ranks


def _first_layer(group: Any) -> Any:
    """The root item of a ``tp.Group``, or the first of a layer if the root only stands for channels of several."""
    root = group[0].dep.target.module
    layers = set(group._DG.model.modules()) if isinstance(root, nn.Module) else {root}
    return group[0] if root in layers else next((i for i in group if i.dep.target.module in layers), group[0])


def _stale(name: str, known: int | None, now: int | None) -> str:
    return (
        f"statistics are stale: {name} had {known} channels when they were collected and has {now} now; "
        "call collect(model, example_inputs, loader) again after every pruning step"
    )
