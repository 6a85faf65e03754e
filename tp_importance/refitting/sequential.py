"""LayerRefit one consumer after the other, each to its inputs in the network pruned so far.

Where memory allows, all samples go through the network as one batch: every consumer is refitted at the moment it is
about to run, so one forward pass refits them all. Otherwise each takes a pass of its own, cut off at the consumer, next
to a dense copy that gives the targets.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from operator import length_hint
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..core.copies import copied
from ..core.forward import ForwardFn, layer_input, run_batch
from ..core.loaders import iterate, require_reiterable
from ..core.precision import at_least_float, undisturbed
from ..core.progress import Phase, phase, track
from ..core.untouched import untouched
from ..errors import TracingError
from ..graph.dataflow import Flow
from ..graph.groups import PrunableGroups
from ..graph.patches import bn_gain, require_batched, sampled_output, unfolded_input
from ..graph.taps import added_to, recording, tap
from ..graph.tracing import is_batch_norm
from ..graph.verify import gates
from ..maths.batchnorm import ChannelMoments
from ..maths.least_squares import Shortfall, residual_energy
from ..refitting.report import RefitRow
from ..statistics.consumers import checked_moments
from ..statistics.labels import LabelFn, batch_labels, counted, labels_per_row, require_classes, wanted_classes
from ..statistics.running_statistics import is_calibrated, move_statistics
from .layers import LayerRefit
from .settings import Refit

__all__ = ["SequentialRefit"]

_MORE = (
    "runs more often on the data than on the example inputs; give example inputs like the data, or use mode='parallel'"
)

NEGLIGIBLE_GAIN = 1e-3
"""Batch norm gains below this fraction of the largest: what stands behind them cannot make up for anything."""


@dataclass(frozen=True)
class _Seen:
    """One call of a consumer in the dense network: outputs without bias at the sampled positions, and their frame.

    Attributes:
        y: shape (N, Q, G, O).
        shape: shape of the whole output.
    """

    y: Tensor
    shape: tuple[int, ...]


class _Enough(BaseException):
    """Cuts a forward pass off; no ``Exception``, lest a forward function swallow it."""


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
    _flow: Flow | None = field(default=None, init=False)
    _sums: dict[int, int] = field(default_factory=dict, init=False)
    _running: Phase = field(default=Phase("refitting"), init=False)
    _counts: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64), init=False)

    def run(self, loader: Iterable[Any]) -> list[RefitRow]:
        """Refit all consumers; ``passes`` then says how many (cut-off) passes over the data it took.

        Raises:
            ValueError: for bad data, a class without samples, a consumer that did not run, or weights that are not
                finite.
        """
        model, n = self.groups.trace.model, len(self.refits)
        wanted_classes(self.classes)
        self._find_sums(model)
        batch = None if self._repeated else _joined(loader, self._bytes_per_sample(), self.settings.memory_limit)
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
        targets: dict[int, _Seen] = {}
        dense, pruned = dict[int, Tensor](), dict[int, Tensor]()
        before: dict[str, ChannelMoments] = {}

        def look(i: int, x: Tensor, out: Tensor) -> None:
            targets[i] = self._target(i, x, out, self._generator(i))

        def act(i: int, x: Tensor) -> None:
            r = self.refits[i]
            if i not in targets:
                raise ValueError(f"layer {r.name} {_MORE}")
            sums, seen = Shortfall(), targets.pop(i)
            if i in self._sums:
                seen = self._corrected(i, seen, dense.pop(i), pruned.pop(i))
            self._add(sums, i, x, seen, labels, self._generator(i))
            rows[r.name] = self._solve(r, sums)

        def measure(name: str, x: Tensor) -> None:
            before[name] = ChannelMoments.of(x)

        def calibrate(name: str, norm: nn.Module, x: Tensor) -> None:
            if name not in before:
                raise ValueError(f"layer {name} {_MORE}")
            move_statistics(norm, name, before.pop(name), ChannelMoments.of(x))

        with ExitStack() as stack:
            for i, r in enumerate(self.refits):
                stack.callback(_after(r.module, partial(look, i)))
            for name, norm in self._norms():
                stack.callback(_before(norm, partial(measure, name)))
            stack.enter_context(self._taps(model, {i: (dense, self._generator(i)) for i in self._sums}))
            self._forward(model, batch)
        with gates(model, self.groups, _lists(self.removed)), ExitStack() as stack:
            for i, r in enumerate(self.refits):
                stack.callback(_before(r.module, partial(act, i)))
            for name, norm in self._norms():
                stack.callback(_before(norm, partial(calibrate, name, norm)))
            stack.enter_context(self._taps(model, {i: (pruned, self._generator(i)) for i in self._sums}))
            self._forward(model, batch)
        for r in self.refits:
            if r.name not in rows:
                checked_moments(r.name, None)
        return [rows[r.name] for r in self.refits]

    # -- one pass per consumer

    def _one_by_one(self, model: nn.Module, loader: Iterable[Any]) -> list[RefitRow]:
        dense, rows, order = copied(model), [], self.groups.trace.first_call()
        index = {r.name: i for i, r in enumerate(self.refits)}
        stops = [*index, *(name for name, _ in self._norms())]
        with gates(model, self.groups, _lists(self.removed)):
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
        ours, theirs, at_sum = self._generator(i), self._generator(i), (self._generator(i), self._generator(i))
        calls: list[tuple[Tensor, Tensor]] = []
        inputs: list[Tensor] = []
        added = [i] if i in self._sums else []
        for batch in iterate(loader):
            other: tuple[dict[int, Tensor], dict[int, Tensor]] = {}, {}
            with ExitStack() as stack:
                stack.callback(_after(twin, lambda x, out: calls.append((x.clone(), out)), cut))
                stack.enter_context(self._taps(dense, {j: (other[0], at_sum[0]) for j in added}))
                self._forward(dense, batch)
            with ExitStack() as stack:
                stack.callback(_before(r.module, lambda x: inputs.append(x.clone()), cut))
                stack.enter_context(self._taps(model, {j: (other[1], at_sum[1]) for j in added}))
                self._forward(model, batch)
            labels = self._labels(batch)
            for x, call in zip(inputs, calls, strict=True):
                seen = self._target(i, *call, theirs)
                if added:
                    seen = self._corrected(i, seen, other[0][i], other[1][i])
                self._add(sums, i, x, seen, labels, ours)
            calls.clear()
            inputs.clear()
        require_classes(wanted_classes(self.classes), self._counts)
        return self._solve(r, sums)

    def _recalibrate(self, model: nn.Module, dense: nn.Module, name: str, loader: Iterable[Any]) -> None:
        networks = (dense, model)
        pooled: list[list[ChannelMoments]] = [[], []]

        def look(found: list[ChannelMoments], x: Tensor) -> None:
            new = ChannelMoments.of(x)
            found[:] = [found[0].merged(new) if found else new]

        with ExitStack() as stack:
            for network, found in zip(networks, pooled, strict=True):
                norm = network.get_submodule(name)
                stack.callback(_before(norm, partial(look, found), name not in self._repeated))
            for batch in iterate(loader):
                for network in networks:
                    self._forward(network, batch)
        if all(pooled):
            move_statistics(model.get_submodule(name), name, pooled[0][0], pooled[1][0])

    # -- sums

    def _find_sums(self, model: nn.Module) -> None:
        """Consumers whose output, behind a batch norm of their own if any, is added to something already there."""
        if not self.settings.residual:
            return
        self._flow = recording(model, self.example_inputs, self.forward_fn)
        if self._flow is None:
            return
        for i, r in enumerate(self.refits):
            other = added_to(self._flow, r.name, r.batch_norm)
            if other is not None:
                self._sums[i] = other

    @contextmanager
    def _taps(self, model: nn.Module, into: Mapping[int, tuple[dict[int, Tensor], torch.Generator]]) -> Iterator[None]:
        """While ``model`` runs, store what is added to the consumers ``into``, at their sampled positions."""
        consumers: dict[int, list[int]] = {}
        for i in into:
            consumers.setdefault(self._sums[i], []).append(i)

        def keep(value: int, tensor: Tensor) -> None:
            for i in consumers[value]:
                store, generator = into[i]
                module = self.refits[i].module
                with undisturbed(tensor.device):
                    store[i] = sampled_output(module, at_least_float(tensor), self.settings.sampled, generator)

        if self._flow is None or not into:
            yield
            return
        try:
            with tap(model, self._flow, {value: partial(keep, value) for value in consumers}):
                yield
        except TracingError as error:
            raise ValueError(f"{error}: its control flow depends on the data; pass Refit(residual=False)") from error

    def _corrected(self, i: int, seen: _Seen, dense: Tensor, pruned: Tensor) -> _Seen:
        """Target with which the sum is that of the dense network; outputs of negligible gain keep their own."""
        r = self.refits[i]
        gain = bn_gain(r.batch_norm, dense.shape[2]).to(dense)
        usable = gain.abs() > NEGLIGIBLE_GAIN * gain.abs().max()
        wanted = torch.where(usable, (dense - pruned) / torch.where(usable, gain, 1.0), 0.0)
        return replace(seen, y=seen.y + wanted.view(seen.y.shape).to(seen.y))

    # -- parts

    def _target(self, i: int, x: Tensor, out: Tensor, generator: torch.Generator) -> _Seen:
        """What the consumer, whose weight is still the dense one, gives at the sampled positions."""
        r = self.refits[i]
        require_batched(r.name, r.module, x)
        u = unfolded_input(r.module, x, out, self.settings.sampled, generator)
        return _Seen(torch.einsum("nqgd,god->nqgo", u, r.weight.to(u)), tuple(out.shape))

    def _add(
        self, sums: Shortfall, i: int, x: Tensor, seen: _Seen, labels: Tensor | None, generator: torch.Generator
    ) -> None:
        """Add the rows of one call; the positions are those of the dense network."""
        r = self.refits[i]
        frame = torch.empty(seen.shape, device="meta")  # only its shape is looked at
        u, y = unfolded_input(r.module, x, frame, self.settings.sampled, generator), seen.y
        if labels is not None:
            chosen = labels_per_row(r.name, x, labels) >= 0
            u, y = u[chosen.to(u.device)], y[chosen.to(y.device)]
        sums.update(u.flatten(0, 1), y.flatten(0, 1), r.plain)

    def _solve(self, r: LayerRefit, sums: Shortfall) -> RefitRow:
        checked_moments(r.name, sums.inputs)
        self._running.advance()
        second, mean, cross, error, energy, lacking = sums.moments(r.centred)
        if not torch.isfinite(energy.sum()):
            raise ValueError(f"the input of layer {r.name} is not finite; check the data and the model")
        target = (r.plain.to(mean) @ mean.unsqueeze(2)).squeeze(2) + lacking
        new, after, ridge = r.plain, error, None
        if bool((error > 0).any()):  # else bit for bit what it was
            new, ridge = r.refitted(self.settings.ridge, second, cross, error, sums.inputs.rows)
            step = new.to(second) - r.plain.to(second)
            after = residual_energy(second, step, cross, error)
        return r.adopt(new, error, after, energy, mean, target, ridge)

    def _forward(self, model: nn.Module, batch: Any) -> None:
        try:
            run_batch(model, batch, self.forward_fn)
        except _Enough:
            pass

    def _labels(self, batch: Any) -> Tensor | None:
        """Labels, -1 outside of the classes; ``None`` if all samples count."""
        wanted = wanted_classes(self.classes)
        if wanted is None:
            return None
        labels = batch_labels(batch, self.label_fn, self.forward_fn, True)
        labels = torch.where(torch.isin(labels, wanted), labels, -1)
        self._counts = counted(labels, self._counts)
        return labels

    def _generator(self, i: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.settings.seed * 1_000_003 + i)

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

    def _bytes_per_sample(self) -> int:
        """Estimate: all targets, and at the worst layer its rows and twice what goes in and out."""
        trace, item = self.groups.trace, 4
        index, targets, worst = {r.name: i for i, r in enumerate(self.refits)}, 0, 0.0
        for call in trace.calls:
            here = 2 * (math.prod(call.in_shape) + math.prod(call.out_shape)) / trace.batch_size
            if call.name in index:
                i = index[call.name]
                groups, outputs, d = self.refits[i].weight.shape
                total = math.prod(call.out_shape) // (trace.batch_size * groups * outputs)
                q = total if self.settings.sampled is None else min(self.settings.sampled, total)
                targets += q * groups * outputs * (3 if i in self._sums else 1)  # with those of the sum, both networks'
                here += 3 * q * groups * (d + outputs)
            worst = max(worst, here)
        return int(item * (worst + targets))


def _joined(loader: Iterable[Any], bytes_per_sample: int, limit: int) -> Any | None:
    """All batches of a loader as one, or ``None`` if that takes too much memory or they do not fit together."""
    batches, samples, spec = [], 0, None
    for batch in track(iterate(loader), "reading", length_hint(loader), unit="batch"):
        leaves, this = tree_flatten(batch)
        sizes = {len(leaf) if isinstance(leaf, Tensor) and leaf.dim() else None for leaf in leaves}
        if len(sizes) != 1 or None in sizes or (spec is not None and this != spec):
            return None
        samples += sizes.pop() or 0
        if samples * bytes_per_sample > limit:
            return None
        batches.append(leaves)
        spec = this
    if not batches or spec is None:
        raise ValueError("the loader gave no batch; a re-iterable of batches is needed (a generator runs only once)")
    columns = list(zip(*batches, strict=True))
    if any(len({(leaf.shape[1:], leaf.dtype, leaf.device) for leaf in column}) > 1 for column in columns):
        return None
    return tree_unflatten([torch.cat(column) if len(column) > 1 else column[0] for column in columns], spec)


def _before(module: nn.Module, fn: Callable[[Tensor], None], cut: bool = False) -> Callable[[], None]:
    """Call ``fn(input)`` before the module runs, and end the pass there if ``cut``; returns what takes it off."""

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = layer_input(args, kwargs)
        with undisturbed(x.device):
            fn(at_least_float(x))
        if cut:
            raise _Enough

    return module.register_forward_pre_hook(hook, with_kwargs=True).remove


def _after(module: nn.Module, fn: Callable[[Tensor, Tensor], None], cut: bool = False) -> Callable[[], None]:
    """Call ``fn(input, output)`` after the module ran, and end the pass there if ``cut``."""

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        x = layer_input(args, kwargs)
        with undisturbed(x.device):
            fn(at_least_float(x), at_least_float(output))
        if cut:
            raise _Enough

    return module.register_forward_hook(hook, with_kwargs=True).remove


def _lists(removed: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    return {name: list(units) for name, units in removed.items() if len(units)}
