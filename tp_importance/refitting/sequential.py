"""Refit one consumer after the other, each to its inputs in the network pruned so far.

Where memory allows, all samples go through the network as one batch: every consumer is refitted at the moment it is
about to run, so one forward pass refits them all. Otherwise each takes a pass of its own, cut off at the consumer, next
to a dense copy that gives the targets.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from ..core.copies import copied
from ..core.forward import ForwardFn
from ..core.loaders import iterate, require_reiterable
from ..core.positions import counted_positions, with_positions
from ..core.progress import Phase, phase
from ..core.untouched import untouched
from ..graph.groups import PrunableGroups
from ..graph.layer_kinds import is_batch_norm
from ..graph.masking import masked_units
from ..graph.patches import at_positions, fork
from ..maths.batchnorm import ChannelMoments, PooledMoments
from ..maths.least_squares import Shortfall
from ..refitting.report import RefitRow
from ..statistics.consumers import checked_moments
from ..statistics.labels import LabelFn, batch_labels, counted, labels_per_position, require_classes, wanted_classes
from ..statistics.running_statistics import is_calibrated, move_statistics
from .hooks import after_layer, before_layer, run_until_cut
from .layers import LayerRefit
from .one_batch import bytes_per_sample, one_batch
from .settings import Refit
from .solving import refitted_by_shortfall
from .targets import Target, Targets

__all__ = ["SequentialRefit"]

_MORE = (
    "runs more often on the data than on the example inputs; give example inputs like the data, or use mode='parallel'"
)


@dataclass
class SequentialRefit:
    """Settings and data of a sequential refit; :meth:`run` does it.

    Attributes:
        groups: groups of the model, which is changed in place.
        removed: units that are to go, per group name.
        refits: consumers to be refitted, in execution order.
        settings: of the refit.
        example_inputs: what the groups were traced with.
        classes: only samples of these labels count.
        forward_fn: ``forward_fn(model, batch)``.
        label_fn: ``label_fn(batch)``.
    """

    groups: PrunableGroups
    removed: Mapping[str, Sequence[int]]
    refits: Sequence[LayerRefit]
    settings: Refit
    example_inputs: Any
    classes: Sequence[int] | None = None
    forward_fn: ForwardFn | None = None
    label_fn: LabelFn | None = None
    passes: int = field(default=0, init=False)
    _targets: Targets = field(init=False)
    _running: Phase = field(default=Phase("refitting"), init=False)
    _counts: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64, device="cpu"), init=False)

    def run(self, loader: Iterable[Any]) -> list[RefitRow]:
        """Refit all consumers; ``passes`` then says how many (cut-off) passes over the data it took.

        Raises:
            ValueError: for bad data, a class without samples, a consumer that did not run, or weights that are not
                finite.
        """
        model, n = self.groups.trace.model, len(self.refits)
        wanted_classes(self.classes)
        self._targets = Targets(self.groups.trace, self.refits, self.settings, self.example_inputs, self.forward_fn)
        batch = None if self._repeated else self._one_batch(loader)
        statistics = (b for m in model.modules() if is_batch_norm(m) for b in m.buffers(recurse=False))
        kept = untouched(model, statistics)  # which are to change, as the weights are
        with kept, torch.no_grad(), phase("refitting", n, unit="layer", layers=n) as self._running:
            model.eval()
            if batch is not None:
                self.passes = 2
                return self._sweep(model, batch)
            require_reiterable(loader)
            return self._one_by_one(model, loader)

    # -- one pass

    def _sweep(self, model: nn.Module, batch: Any) -> list[RefitRow]:
        labels, rows = self._labels(batch), dict[str, RefitRow]()
        require_classes(wanted_classes(self.classes), self._counts)
        targets, found = self._targets, dict[int, Target]()
        dense, pruned = dict[int, Tensor](), dict[int, Tensor]()
        before: dict[str, ChannelMoments] = {}

        def look(i: int, x: Tensor, out: Tensor) -> None:
            found[i] = targets.dense(i, x, out, targets.generator(i))

        def act(i: int, x: Tensor) -> None:
            r = self.refits[i]
            if i not in found:
                raise ValueError(f"layer {r.name} {_MORE}")
            sums, target = Shortfall(), found.pop(i)
            if i in targets.sums:
                target = targets.with_sum(i, target, dense.pop(i), pruned.pop(i))
            self._add(sums, i, x, target, labels, targets.generator(i))
            rows[r.name] = self._solve(r, sums)

        def measure(name: str, x: Tensor) -> None:
            before[name] = ChannelMoments.of(x)

        def calibrate(name: str, norm: nn.Module, x: Tensor) -> None:
            if name not in before:
                raise ValueError(f"layer {name} {_MORE}")
            move_statistics(norm, name, before.pop(name), ChannelMoments.of(x))

        with ExitStack() as stack:
            for i, r in enumerate(self.refits):
                stack.callback(after_layer(r.module, partial(look, i)))
            for name, norm in self._norms():
                stack.callback(before_layer(norm, partial(measure, name)))
            stack.enter_context(targets.summands(model, {i: (dense, targets.generator(i)) for i in targets.sums}))
            run_until_cut(model, batch, self.forward_fn)
        with masked_units(model, self.groups, _lists(self.removed)), ExitStack() as stack:
            for i, r in enumerate(self.refits):
                stack.callback(before_layer(r.module, partial(act, i)))
            for name, norm in self._norms():
                stack.callback(before_layer(norm, partial(calibrate, name, norm)))
            stack.enter_context(targets.summands(model, {i: (pruned, targets.generator(i)) for i in targets.sums}))
            run_until_cut(model, batch, self.forward_fn)
        for r in self.refits:
            if r.name not in rows:
                checked_moments(r.name, None)
        return [rows[r.name] for r in self.refits]

    # -- one pass per consumer

    def _one_by_one(self, model: nn.Module, loader: Iterable[Any]) -> list[RefitRow]:
        dense, rows, order = copied(model), [], self.groups.trace.first_call()
        index = {r.name: i for i, r in enumerate(self.refits)}
        stops = [*index, *(name for name, _ in self._norms())]
        with masked_units(model, self.groups, _lists(self.removed)):
            for name in sorted(stops, key=lambda n: order.get(n, 0)):
                self.passes += 2
                if name in index:
                    rows.append(self._refit_alone(model, dense, index[name], loader))
                else:
                    self._recalibrate(model, dense, name, loader)
        return rows

    def _refit_alone(self, model: nn.Module, dense: nn.Module, i: int, loader: Iterable[Any]) -> RefitRow:
        r, sums = self.refits[i], Shortfall()
        twin, cut = dense.get_submodule(r.name), r.name not in self._repeated
        targets = self._targets
        ours, theirs, *at_sum = (targets.generator(i) for _ in range(4))
        calls: list[tuple[Tensor, Tensor]] = []
        inputs: list[Tensor] = []
        added = [i] if i in targets.sums else []
        for batch in iterate(loader):
            other: tuple[dict[int, Tensor], dict[int, Tensor]] = {}, {}
            with ExitStack() as stack:
                stack.callback(after_layer(twin, lambda x, out: calls.append((x.clone(), out)), cut))
                stack.enter_context(targets.summands(dense, {j: (other[0], at_sum[0]) for j in added}))
                run_until_cut(dense, batch, self.forward_fn)
            with ExitStack() as stack:
                stack.callback(before_layer(r.module, lambda x: inputs.append(x.clone()), cut))
                stack.enter_context(targets.summands(model, {j: (other[1], at_sum[1]) for j in added}))
                run_until_cut(model, batch, self.forward_fn)
            labels = self._labels(batch)
            for x, call in zip(inputs, calls, strict=True):
                target = targets.dense(i, *call, theirs)
                if added:
                    target = targets.with_sum(i, target, other[0][i], other[1][i])
                self._add(sums, i, x, target, labels, ours)
            calls.clear()
            inputs.clear()
        require_classes(wanted_classes(self.classes), self._counts)
        return self._solve(r, sums)

    def _recalibrate(self, model: nn.Module, dense: nn.Module, name: str, loader: Iterable[Any]) -> None:
        networks = (dense, model)
        pooled = PooledMoments(), PooledMoments()

        def look(found: PooledMoments, x: Tensor) -> None:
            found.add(name, ChannelMoments.of(x))

        with ExitStack() as stack:
            for network, found in zip(networks, pooled, strict=True):
                norm = network.get_submodule(name)
                stack.callback(before_layer(norm, partial(look, found), name not in self._repeated))
            for batch in iterate(loader):
                for network in networks:
                    run_until_cut(network, batch, self.forward_fn)
        if all(pooled):
            move_statistics(model.get_submodule(name), name, pooled[0][name], pooled[1][name])

    # -- parts

    def _add(
        self, sums: Shortfall, i: int, x: Tensor, target: Target, labels: Tensor | None, generator: torch.Generator
    ) -> None:
        """Add the rows of one call; the positions are those of the dense network."""
        r = self.refits[i]
        again = fork(generator)
        u, y = self._targets.rows(i, x, target, generator), target.y
        if labels is None:
            sums.update(u.flatten(0, 1), y.flatten(0, 1), r.plain)
            return
        frame = torch.empty(target.shape, device="meta")
        chosen = labels_per_position(r.name, r.module, x, frame, labels.to(x.device)) >= 0
        if chosen.dim() == 2:
            chosen = at_positions(chosen, self.settings.sampled, again)
            u, y = (rows.flatten(0, 1)[chosen.flatten().to(rows.device)] for rows in (u, y))
        else:
            u, y = (rows[chosen.to(rows.device)].flatten(0, 1) for rows in (u, y))
        sums.update(u, y, r.plain)

    def _solve(self, r: LayerRefit, sums: Shortfall) -> RefitRow:
        checked_moments(r.name, sums.inputs)
        self._running.advance()
        return refitted_by_shortfall(r, sums, self.settings.ridge)

    def _labels(self, batch: Any) -> Tensor | None:
        """Labels of samples or positions, -1 where they do not count; ``None`` if all do."""
        wanted, positions = wanted_classes(self.classes), counted_positions(batch, self.forward_fn)
        if wanted is None:
            return None if positions is None else positions.long() - 1
        labels = batch_labels(batch, self.label_fn, self.forward_fn, True)
        labels = torch.where(torch.isin(labels, wanted), labels, -1)
        self._counts = counted(labels, self._counts)
        return with_positions(labels, positions)

    def _norms(self) -> list[tuple[str, nn.Module]]:
        """Batch norms behind the first refit, for the others see what they saw before, but not right behind a refit."""
        own = {r.batch_norm for r in self.refits}
        order = self.groups.trace.first_call()
        first = min(order.get(r.name, 0) for r in self.refits)
        return [
            (name, m)
            for name, m in self.groups.trace.model.named_modules()
            if self.settings.recalibrate and is_calibrated(m) and order.get(name, -1) > first and m not in own
        ]

    @cached_property
    def _repeated(self) -> set[str]:
        """Layers of interest that run more than once per forward pass: all their calls must be pooled."""
        counts = Counter(call.name for call in self.groups.trace.calls)
        return {n for n in [*(r.name for r in self.refits), *(n for n, _ in self._norms())] if counts[n] > 1}

    def _one_batch(self, loader: Iterable[Any]) -> Any | None:
        needed = bytes_per_sample(self.groups.trace, self.refits, self.settings.sampled, self._targets.sums)
        return one_batch(loader, needed, self.settings.memory_limit)


def _lists(removed: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    return {name: list(units) for name, units in removed.items() if len(units)}
