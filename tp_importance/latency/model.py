"""Latency of a network at any widths of its groups, predicted from layer times and calibrated on the network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import nn

from ..core.copies import copied
from ..core.guards import preserved
from ..core.progress import phase, track
from ..core.types import Floats
from ..graph.cost_terms import channels_per_unit
from ..graph.counting import Call
from ..graph.groups import PrunableGroups
from ..graph.layer_kinds import CONV
from ..graph.surgery import remove_units
from ..maths.latency import Grid, Surfaces, calibrate
from .measure import Latency
from .table import LatencyTable, TimedLayer, conditions_of, timed_layer

__all__ = ["LatencyModel"]

FRACTIONS = (0.75, 0.5, 0.25)
"""Copies of the network at these uniform widths calibrate the model, with the dense one."""


@dataclass(frozen=True)
class _Width:
    """A number of channels: ``fixed + Σ per_unit[g] · u_g``; ``dim`` is where they are in the tensor."""

    fixed: int
    per_unit: tuple[tuple[int, int], ...]
    dim: int


class LatencyModel:
    r"""Predicted latency for any widths.

    .. math:: T(u) = o + s \sum_l t_l\bigl(c^{in}_l(u),\, c^{out}_l(u)\bigr)

    with the time :math:`t_l` of layer l by itself, bilinear between measured widths and stair-wise constant inside
    blocks of channels, and overhead o and scale s fitted to the measured latency of the network and of uniformly
    narrowed copies of it: the sum of the layers is not the network (memory, additions, dispatch). T never falls when a
    width grows. Timed layers: convolutions, linear layers, batch norms, and modules without parameters that work on
    each channel (activations, pools). Everything else is part of o and s.

    Build it with :meth:`measure`; the constructor is given names, grids and widths of the timed calls. Source: ours.

    Attributes:
        dense: measured latency of the network.
        overhead_ms: o in milliseconds.
        scale: s.
        calibration: measured and predicted milliseconds of every network it was fitted to, by kept fraction.
    """

    def __init__(
        self,
        groups: PrunableGroups,
        layers: list[str],
        grids: list[Grid],
        widths: list[tuple[_Width, _Width]],
        dense: Latency,
    ) -> None:
        self._layers, self._grids, self._widths = layers, grids, widths
        self._surfaces = Surfaces(grids)
        self.dense, self.overhead_ms, self.scale = dense, 0.0, 1.0
        self.calibration: dict[str, tuple[float, float]] = {}
        shape = (len(widths), len(groups))
        self._in, self._out = np.zeros(shape), np.zeros(shape)
        self._fixed = np.array([[i.fixed, o.fixed] for i, o in widths], np.float64).reshape(-1, 2)
        for n, pair in enumerate(widths):
            for matrix, width in zip((self._in, self._out), pair, strict=True):
                for g, count in width.per_unit:
                    matrix[n, g] = count
        self._pair_layer, self._pair_group = np.nonzero(self._in + self._out)
        self._all = np.arange(len(widths))

    @classmethod
    def measure(
        cls,
        groups: PrunableGroups,
        example_inputs: Any,
        table: LatencyTable | None = None,
    ) -> LatencyModel:
        """Time the layers that ``table`` does not know yet, the network, and narrowed copies of it.

        Args:
            groups: groups of the network as it is now.
            example_inputs: what is timed: batch size and image size are theirs.
            table: layer times; default: a new one, forgotten afterwards.

        Returns:
            The model; the network is as before.

        Raises:
            ValueError: if the table was measured under other conditions.

        Example:
            >>> from tp_importance import prunable_groups
            >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
            >>> x = torch.randn(1, 3, 8, 8)
            >>> model = LatencyModel.measure(prunable_groups(net, x), x, LatencyTable(min_run_time=0.001))
            >>> model.predict([8]) >= model.predict([4]) > 0
            True
        """
        traced = groups.trace
        table = (LatencyTable() if table is None else table).use(conditions_of(traced.model, example_inputs))
        run = groups.options.forward_fn

        def clock(model: nn.Module) -> Latency:
            return table.network(model, example_inputs, run)

        with preserved(traced.model), torch.inference_mode(False), phase("measuring latency"):
            dense = clock(traced.model)
            found = _timed(groups)
            order = sorted(found, key=lambda entry: -entry[0].macs)  # stairs are looked for in the largest of a family
            # no name for the generator: a traceback would keep its phase open
            grids = {
                (call.name, layer.key): table.grid(layer)
                for call, layer, _ in track(order, "timing layers", unit="layer")
            }
            model = cls(
                groups,
                [call.name for call, _, _ in found],
                [grids[call.name, layer.key] for call, layer, _ in found],
                [widths for _, _, widths in found],
                dense,
            )
            model._calibrate(groups, example_inputs, clock)
        table.save()
        return model

    def predict(self, units: ArrayLike) -> float:
        """Latency in milliseconds for ``units`` of shape (G,)."""
        u = np.asarray(units, np.float64)
        return self.overhead_ms + self.scale * float(self._times(u).sum())

    def marginal(self, units: ArrayLike, step: ArrayLike) -> Floats:
        """Change of the latency when one group at a time moves by ``step`` units, the others fixed; shape (G,)."""
        u, s = np.asarray(units, np.float64), np.asarray(step, np.float64)
        layer, group = self._pair_layer, self._pair_group
        c_in, c_out = self._channels(u)
        after = self._surfaces(
            layer, (c_in[layer] + self._in[layer, group] * s[group]), c_out[layer] + self._out[layer, group] * s[group]
        )
        change = after - self._surfaces(self._all, c_in, c_out)[layer]
        return np.asarray(self.scale * np.bincount(group, change, len(u)), np.float64)

    def of(self, groups: PrunableGroups) -> LatencyModel:
        """The same times and calibration for the groups of the network after a surgery."""
        widths: dict[str, list[tuple[_Width, _Width]]] = {}
        for call, _, at in _timed(groups):
            widths.setdefault(call.name, []).append(at)
        turns = {name: iter(calls) for name, calls in widths.items()}  # a shared module runs several times
        after = [next(turns[name]) for name in self._layers]
        again = LatencyModel(groups, self._layers, self._grids, after, self.dense)
        again.overhead_ms, again.scale, again.calibration = self.overhead_ms, self.scale, self.calibration
        return again

    def _channels(self, u: Floats) -> tuple[Floats, Floats]:
        return self._fixed[:, 0] + self._in @ u, self._fixed[:, 1] + self._out @ u

    def _times(self, u: Floats) -> Floats:
        return self._surfaces(self._all, *self._channels(u))

    def _calibrate(self, groups: PrunableGroups, example_inputs: Any, clock: Callable[[nn.Module], Latency]) -> None:
        full = np.array([g.n_units for g in groups])
        least = np.array([g.min_units for g in groups])
        measured, widths = {1.0: self.dense.median_ms}, {1.0: full}
        for fraction in track(FRACTIONS, "timing narrowed copies", unit="network"):
            units = np.maximum(np.ceil(full * fraction).astype(int), least)
            if any((units == known).all() for known in widths.values()):
                continue
            twin = copied(groups.trace.model)
            removed = {g.name: list(range(int(u), g.n_units)) for g, u in zip(groups, units, strict=True)}
            remove_units(groups, removed, model=twin)
            measured[fraction], widths[fraction] = clock(twin).median_ms, units
        sums = [float(self._times(u.astype(np.float64)).sum()) for u in widths.values()]
        self.overhead_ms, self.scale = calibrate(sums, list(measured.values()))
        self.calibration = {str(f): (ms, self.predict(widths[f])) for f, ms in measured.items()}


def _timed(groups: PrunableGroups) -> list[tuple[Call, TimedLayer, tuple[_Width, _Width]]]:
    """Every call whose layer is timed, with its widths as functions of the units."""
    modules = dict(groups.trace.model.named_modules())
    sides = channels_per_unit(groups)
    units = [g.n_units for g in groups]
    one = _Width(1, (), 1)
    outputs: list[tuple[tuple[int, ...], _Width]] = []
    found = []
    for call in groups.trace.calls:
        module = modules[call.name]
        if not call.in_shape:
            continue
        if isinstance(module, (*CONV, nn.Linear)):
            dim = len(call.out_shape) - 1 if isinstance(module, nn.Linear) else 1
            wide = call.out_shape[dim]
            at = _width(sides.get((call.name, "out"), {}), units, wide, dim)
            layer = timed_layer(module, call)
            inputs = (
                one
                if layer is None or layer.inputs == 1
                else _width(sides.get((call.name, "in"), {}), units, layer.inputs, dim)
            )
        else:
            own = sides.get((call.name, "out"))
            dim = 1 if len(call.in_shape) > 1 else 0
            if own is not None:
                at = _width(own, units, call.in_shape[dim], dim)
            else:  # no channels of its own: those of the last tensor of this shape
                known = next((w for shape, w in reversed(outputs) if shape == call.in_shape), None)
                at = known or _Width(call.in_shape[dim], (), dim)
            layer, inputs = timed_layer(module, call, at.dim), one
        if layer is not None:
            outputs.append((call.out_shape, at))
            found.append((call, layer, (inputs, at)))
    return found


def _width(per_unit: Mapping[int, int], units: Sequence[int], width: int, dim: int) -> _Width:
    fixed = width - sum(n * units[g] for g, n in per_unit.items())
    return _Width(fixed, tuple(per_unit.items()), dim)
