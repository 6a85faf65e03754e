"""Second moments of what every consumer receives, collected once for all groups, budgets and class weights."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ..core.forward import ForwardFn
from ..graph.groups import ChannelGroup, PrunableGroups
from ..graph.patches import at_positions, bn_gain, consumer_weight, feature_channels, fork, unfolded_input
from ..maths.moments import Moments, consumer_scatter
from .observe import Watch
from .residual_sums import Disturbed, watch_residual_sums
from .sketch import contributions

__all__ = ["ConsumerStatistics", "check_reading", "checked_moments"]

MAX_FEATURES = 4608
"""Features (channels × taps) up to which a consumer's full moment matrix is kept: 512 channels of a 3×3 kernel."""

ENERGY_EXPONENT = 0.75
"""How far CATRO's losses are taken relative to the energy a group sends to a consumer; chosen by measurement."""

STEADY = 1e-4
"""Below this fraction of its squared mean, the variance of a tensor does not count: it is a constant."""


def checked_moments(name: str, moments: Moments | None) -> Moments:
    """Moments of the input of layer ``name``, if there are any and they are finite; else ``ValueError``."""
    if moments is None or moments.second is None or not moments.rows:
        raise ValueError(f"layer {name} did not run on the data, so there are no statistics of it")
    if not torch.isfinite(moments.second.sum()):
        raise ValueError(f"the input of layer {name} is not finite; check the data and the model")
    return moments


def check_reading(class_weight: float, positions: int | None) -> None:
    """Refuse what no criterion in the space of the consumers takes."""
    if not 0.0 <= class_weight <= 1.0:
        raise ValueError(f"class_weight={class_weight!r} must be a fraction in [0, 1]")
    if positions is not None and (isinstance(positions, bool) or not isinstance(positions, int) or positions < 1):
        raise ValueError(f"positions={positions!r} must be a positive integer, or None for all")


class ConsumerStatistics:
    r"""Moments of the unfolded inputs of all consumers of some groups.

    Memory: one d×d float64 matrix and K class sums of length d per consumer, d = channels/groups · taps, however
    many samples there are. A consumer with more than :data:`MAX_FEATURES` features (a linear layer behind a
    flattened map) is watched through the contributions of its channels to
    :data:`~tp_importance.statistics.sketch.SKETCH` random ±1 combinations of its outputs instead, an unbiased
    estimate that is exact up to that many outputs (Johnson-Lindenstrauss).

    Args:
        groups: the groups whose consumers are watched.
        positions: output positions per sample, ``None`` for all.
        seed: of positions and sketches.
    """

    def __init__(self, groups: PrunableGroups, *, positions: int | None = 8, seed: int = 0) -> None:
        self._trace, self._model = groups.trace, groups.trace.model
        self._names = list(dict.fromkeys(r.name for g in groups for r in g.consumers))
        self._gains = {}
        self._norms = {name: groups.trace.batch_norm_behind(name) for name in self._names}
        for name in self._names:
            weight = consumer_weight(self._model.get_submodule(name))
            gain = bn_gain(self._norms[name], weight.shape[0] * weight.shape[1])
            self._gains[name] = gain.view(weight.shape[:2]).to(weight.device)
        self._positions = positions
        self._seed = seed
        self._moments = {name: Moments() for name in self._names}
        self._samples: Counter[int] = Counter()
        self.labels: Tensor | None = None
        self._disturbed = Disturbed()
        self._energies: dict[str, float] = {}

    def covers(self, groups: PrunableGroups, positions: int | None) -> bool:
        """Whether these are statistics of all consumers of ``groups``, at no fewer ``positions`` than asked for."""
        enough = self._positions is None or (positions is not None and self._positions >= positions)
        same = self._model is groups.trace.model
        return enough and same and {r.name for g in groups for r in g.consumers} <= self._moments.keys()

    def watches(self) -> list[Watch]:
        """What :func:`~tp_importance.statistics.observe.observe` is to watch."""
        return [
            Watch(name, module, self._collector(name, module, i), by_position=True)
            for i, name in enumerate(self._names)
            for module in [self._model.get_submodule(name)]
        ]

    def sums(self, example_inputs: Any, forward_fn: ForwardFn | None = None) -> AbstractContextManager[None]:
        """While the model runs over the data, see also what outputs of consumers are added to, for :meth:`energy`.

        Samples, or their positions, whose entry in ``labels``, to be set before each batch, is negative do not count.

        Args:
            example_inputs: what the groups were traced with.
            forward_fn: how the model is called; also with the example inputs.

        Warns:
            UserWarning: if the model does other operations than on its example inputs; no sum is used then.
        """
        flow = self._trace.call(example_inputs, forward_fn)
        return watch_residual_sums(self._model, self._norms, self._disturbed, lambda: self.labels, flow)

    def energy(self, name: str) -> float:
        """Variance, summed over channels, of what errors of consumer ``name`` disturb.

        That is its output behind the batch norm, or the sum this is added up to, or what a layer norm makes of either,
        if :meth:`sums` saw them; at least :data:`STEADY` of its squared mean.

        Raises:
            ValueError: as :meth:`moments`, and if it is not finite.
        """
        if name not in self._energies:
            if name in self._disturbed.sums:
                seen = self._disturbed.sums[name]
                variance, mean = seen.m2 / seen.count, seen.mean
            else:
                variance, mean = self._output(name)
            # what hardly varies about a large mean, such as a saturated gate, must not count as much as any other
            energy = float(torch.maximum(variance.sum(), STEADY * mean.square().sum()))
            if not math.isfinite(energy):
                raise ValueError(f"what layer {name} gives is not finite; check the data and the model")
            self._energies[name] = energy
        return self._energies[name]

    def _output(self, name: str) -> tuple[Tensor, Tensor]:
        """Variance and mean of the outputs of a consumer behind its batch norm."""
        module, moments = self._model.get_submodule(name), self.moments(name)
        p, mean = moments.total(), moments.mean()
        if _is_wide(module):  # summed up over the channels already
            return p.sum((1, 2)), mean.sum(1)
        gain = self._gains[name].to(p)
        weight = consumer_weight(module).to(p) * gain.unsqueeze(2)
        output = (weight @ mean.unsqueeze(2)).flatten()
        norm = self._norms[name]
        if isinstance(module.bias, Tensor):
            output = output + gain.flatten() * module.bias.detach().to(p)
        if norm is not None and isinstance(norm.running_mean, Tensor):
            output = output - gain.flatten() * norm.running_mean.to(p)
            output = output + norm.bias.detach().to(p) if isinstance(norm.bias, Tensor) else output
        return ((weight @ p) * weight).sum(2).flatten(), output

    def _gain(self, name: str) -> Tensor:
        """Gain of every output of a consumer, (G, O/G): of the batch norm, and of the layer norm, if there is one."""
        gain, behind = self._gains[name], self._disturbed.gain(name)
        return gain if behind is None else gain * behind.to(gain).view(gain.shape)

    def relative(self, name: str) -> float:
        """Factor that makes a loss at consumer ``name`` a fraction of :meth:`energy`; 0 where nothing varies. Ours."""
        energy = self.energy(name)
        return 1.0 / energy if energy > 0 else 0.0

    def moments(self, name: str) -> Moments:
        """What consumer ``name`` has received so far.

        Raises:
            ValueError: if the consumer did not run, or received values that are not finite.
        """
        return checked_moments(name, self._moments[name])

    def samples(self, moments: Moments) -> float:
        """Independent samples behind ``moments``, however many positions they have."""
        return self._samples[id(moments)]

    def blend(self, class_weight: float) -> Callable[[Moments], Tensor]:
        r"""What to take from moments for a class weight θ: :math:`2(\theta S_b + (1-\theta) S_w)`.

        Means of finite classes scatter by chance, so :math:`\frac{K-1}{n-K} S_w` is taken off :math:`S_b`. With θ = ½
        it is the total.
        """

        def matrix(moments: Moments) -> Tensor:
            total = moments.total()
            if class_weight == 0.5:
                return total
            between = moments.between()
            k = int((moments.class_rows > 0).sum())
            between = between - (k - 1) / max(self.samples(moments) - k, 1.0) * (total - between)
            return 2 * (class_weight * between + (1 - class_weight) * (total - between))

        return matrix

    def scatter(self, group: ChannelGroup, matrix: Callable[[Moments], Tensor]) -> Tensor:
        r"""Scatter of the units of ``group``, :math:`\sum_r S_r / E_r^{3/4}` over its consumers r.

        :math:`E_r = 1^\top S_r 1` is what the consumer loses without the whole group. Exponent 1 would make all groups
        equal, 0 count raw energies; ¾ was best or as good as any on four networks and fresh draws
        (docs/benchmarks.md). Ours.

        Args:
            group: one of the groups.
            matrix: what to take from the moments: total, between-class, or a blend; shape (G, d, d).

        Returns:
            shape (U, U); a consumer at which the group does not vary adds nothing.

        Raises:
            ValueError: if a consumer received values that are not finite, or was never run.
        """
        total: Tensor | None = None
        for p, weight, gain, units in self.reads(group, matrix):
            s = consumer_scatter(p, weight, gain, units, group.n_units)
            energy = s.sum().abs()
            s = s / energy**ENERGY_EXPONENT if energy > 0 else s
            total = s if total is None else total + s.to(total.device)
        assert total is not None
        return total

    def reads(
        self, group: ChannelGroup, matrix: Callable[[Moments], Tensor]
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """How every consumer reads the units of ``group``, in order of ``group.consumers``.

        Args:
            group: one of the groups.
            matrix: as for :meth:`scatter`.

        Yields:
            ``matrix`` of its moments, (G, d, d); its weight, (G, O/G, d); the gain behind it, (G, O/G); the unit of
            every feature or -1, (G, d). A wide consumer has a block per output of the sketch, a feature per channel and
            weights of 1.

        Raises:
            ValueError: as :meth:`moments`.
        """
        for member in group.consumers:
            moments, module = self.moments(member.name), self._model.get_submodule(member.name)
            unit_of = torch.full((member.width,), -1, device="cpu")
            unit_of[torch.from_numpy(member.channels)] = torch.from_numpy(member.units)
            p = matrix(moments)
            if _is_wide(module):
                channels = torch.arange(member.width, device="cpu").expand(p.shape[0], -1)
                weight, gain = p.new_ones(p.shape[0], 1, p.shape[1]), p.new_ones(p.shape[0], 1)
            else:
                channels, weight, gain = feature_channels(module), consumer_weight(module), self._gain(member.name)
            yield p, weight, gain, unit_of[channels].to(p.device)

    def _collector(self, name: str, module: nn.Module, index: int) -> Callable[[Tensor, Tensor, Tensor], None]:
        moments = self._moments[name]
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + index)
        project = self._sketch(module, self._gains[name], generator) if _is_wide(module) else None

        def fn(x: Tensor, out: Tensor, labels: Tensor) -> None:
            again = fork(generator) if labels.dim() == 2 else None
            u = unfolded_input(module, x, out, self._positions, generator)
            if again is not None:
                labels = at_positions(labels, self._positions, again)
            keep = labels >= 0
            counts = keep if again is None else keep.any(1)
            self._samples[id(moments)] += int(counts.sum())
            if again is None:  # all positions of a sample count, or none
                if not keep.all():
                    u, labels = u[keep], labels[keep]
                rows, labels = u.flatten(0, 1), labels.repeat_interleave(u.shape[1])
            else:
                rows, labels = u.flatten(0, 1), labels.flatten()
                if not keep.all():
                    rows, labels = rows[keep.flatten()], labels[keep.flatten()]
            moments.update(rows if project is None else project(rows), labels)

        return fn

    def _sketch(self, module: nn.Module, gain: Tensor, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
        """Map rows (R, G, d) to contributions of every channel to a few output combinations, (R, S, C)."""
        weight = consumer_weight(module) * gain.to(consumer_weight(module)).unsqueeze(2)
        if weight.shape[0] > 1:
            raise ValueError(f"grouped consumers with more than {MAX_FEATURES} features per group are not supported")
        return contributions(weight[0], feature_channels(module)[0], generator)


def _is_wide(module: Any) -> bool:
    return consumer_weight(module).shape[2] > MAX_FEATURES
