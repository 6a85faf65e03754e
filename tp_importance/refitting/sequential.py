"""Refit one consumer after the other, each to its inputs in the network pruned so far.

All samples go through the network, and through a dense copy that gives the targets, up to a consumer; it gets its new
weights, and they go on to the next one. So one pass refits them all.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..core.chunks import Chunks
from ..core.copies import copied
from ..core.devices import reference_tensor
from ..core.forward import ForwardFn
from ..core.positions import counted_positions, with_positions
from ..core.progress import LOGGER, Phase, phase
from ..core.untouched import untouched
from ..graph.groups import PrunableGroups
from ..graph.layer_kinds import is_batch_norm
from ..graph.masking import masked_units
from ..graph.patches import at_positions, fork
from ..graph.tape import NotReplayable
from ..maths.batchnorm import ChannelMoments, PooledMoments
from ..maths.least_squares import Shortfall
from ..refitting.report import RefitRow
from ..statistics.consumers import checked_moments
from ..statistics.labels import LabelFn, batch_labels, counted, labels_per_position, require_classes, wanted_classes
from ..statistics.running_statistics import is_calibrated, move_statistics
from .layers import LayerRefit
from .passes import Networks, Passes, ReplayedPasses, Stop, WholePasses
from .settings import Refit
from .solving import refitted_by_shortfall
from .targets import Target, Targets

__all__ = ["SequentialRefit"]

CHUNK_BYTES = 1 << 26
"""Memory of what goes in and out of the largest layer at once, on a CPU; larger batches are rather slower."""
MOST = 64
"""Samples at once at most: the first of them also serve to record the operations."""
FLOAT = 4
"""Bytes of a number."""


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
        dense: the network that gives the targets, of the same operations; default: a copy of the model.
    """

    groups: PrunableGroups
    removed: Mapping[str, Sequence[int]]
    refits: Sequence[LayerRefit]
    settings: Refit
    example_inputs: Any
    classes: Sequence[int] | None = None
    forward_fn: ForwardFn | None = None
    label_fn: LabelFn | None = None
    dense: nn.Module | None = None
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
        statistics = (b for m in model.modules() if is_batch_norm(m) for b in m.buffers(recurse=False))
        kept = untouched(model, statistics)  # which are to change, as the weights are
        with kept, torch.no_grad(), phase("refitting", n, unit="layer", layers=n) as self._running:
            model.eval()
            limit = self.settings.memory_limit
            chunks = Chunks(loader, self._chunk(), limit // 4)
            dense = copied(model) if self.dense is None else self.dense.eval()
            given = Networks(dense, model, self._stops(), self._targets.flow, chunks, self._labels, self.forward_fn)
            with masked_units(model, self.groups, _lists(self.removed)) as masked, masked.apart(given.dense):
                if (passes := self._replayed(given, limit - limit // 4)) is not None:
                    try:
                        rows = self._by(passes)
                        passes.check()
                        return rows
                    except NotReplayable as error:
                        self._start_again(given.dense, f"because {error}")
                return self._by(WholePasses(given))

    # -- passes

    def _replayed(self, given: Networks, limit: int) -> ReplayedPasses | None:
        if any(stop.repeated for stop in given.stops):
            self._running.note(whole_passes="because layers run several times")
            return None
        try:
            passes = ReplayedPasses(given, limit)
        except NotReplayable as error:
            self._running.note(whole_passes=f"because {error}")
            return None
        if passes.count > 2:
            LOGGER.info(
                "memory_limit=%.1f GiB does not hold all samples at %d of %d layers: the network runs again up to them",
                self.settings.memory_limit / 2**30,
                passes.count // 2 - 1,
                len(given.stops),
            )
        return passes

    def _start_again(self, dense: nn.Module, reason: str) -> None:
        """Undo what was refitted; other weights may be masked for the while."""
        self._running.note(whole_passes=reason)
        written = {m for r in self.refits for m in (r.module, r.batch_norm)} | {m for _, m in self._norms()}
        for name, module in self.groups.trace.model.named_modules():
            if module in written:
                module.load_state_dict(dense.get_submodule(name).state_dict())

    def _stops(self) -> list[Stop]:
        """Layers to be refitted and batch norms to be moved, in the order in which they first run."""
        counts = Counter(call.name for call in self.groups.trace.calls)
        order = self.groups.trace.first_call()
        added = {self.refits[i].name: value for i, value in self._targets.sums.items()}
        names = [*(r.name for r in self.refits), *(name for name, _ in self._norms())]
        stops = [Stop(name, added.get(name), counts[name] > 1) for name in names]
        return sorted(stops, key=lambda stop: order.get(stop.name, 0))

    def _by(self, passes: Passes) -> list[RefitRow]:
        self.passes = passes.count
        index, rows = {r.name: i for i, r in enumerate(self.refits)}, list[RefitRow]()
        for stop in passes.stops:
            if stop.name in index:
                rows.append(self._refit(passes, stop, index[stop.name]))
            else:
                self._recalibrate(passes, stop)
        found = {row.name for row in rows}
        for r in self.refits:
            if r.name not in found:
                checked_moments(r.name, None)
        return rows

    def _refit(self, passes: Passes, stop: Stop, i: int) -> RefitRow:
        targets, sums = self._targets, Shortfall()
        ours, theirs, at_sum = (targets.generator(i) for _ in range(3))
        for labels, (dense, pruned) in passes.at(stop):
            for there, here in zip(dense, pruned, strict=True):
                target = targets.dense(i, there.x, there.shape, theirs)
                if there.added is not None and here.added is not None:
                    target = targets.with_sum(i, target, there.added, here.added, at_sum)
                self._add(sums, i, here.x, target, labels, ours)
        require_classes(wanted_classes(self.classes), self._counts)
        return self._solve(self.refits[i], sums)

    def _recalibrate(self, passes: Passes, stop: Stop) -> None:
        pooled = PooledMoments(), PooledMoments()
        for _, both in passes.at(stop):
            for found, calls in zip(pooled, both, strict=True):
                for seen in calls:
                    found.add(stop.name, ChannelMoments.of(seen.x))
        if all(pooled):
            norm = self.groups.trace.model.get_submodule(stop.name)
            move_statistics(norm, stop.name, pooled[0][stop.name], pooled[1][stop.name])

    def _chunk(self) -> int:
        """Samples per batch with which the largest layer takes about :data:`CHUNK_BYTES`."""
        trace = self.groups.trace
        sizes = (FLOAT * (math.prod(c.in_shape) + math.prod(c.out_shape)) for c in trace.calls)
        device = reference_tensor(trace.model)
        chunk = CHUNK_BYTES if device is None or device.device.type == "cpu" else 16 * CHUNK_BYTES
        return min(max(1, chunk * trace.batch_size // max(sizes, default=chunk)), MOST)

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


def _lists(removed: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    return {name: list(units) for name, units in removed.items() if len(units)}
