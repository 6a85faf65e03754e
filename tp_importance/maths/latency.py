"""Latency of layers between measured widths, and of the network they make up (ours)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..core.types import Floats, Ints

__all__ = ["FRACTIONS", "Grid", "Surfaces", "calibrate", "knots", "monotone", "stair"]


FRACTIONS = (1.0, 0.75, 0.5, 0.25, 0.0)
"""Fractions of a full width at which layers are timed; 0 is one step."""


def knots(width: int, step: int = 1, multiple: int = 1) -> list[int]:
    """Widths at which a layer is timed: ends of stairs near :data:`FRACTIONS` of the full width, ascending.

    Args:
        width: full width.
        step: width of a stair.
        multiple: all widths must be multiples of it (convolution groups); ``width`` is one.

    Example:
        >>> knots(64, 16), knots(24, 16), knots(3)
        ([16, 32, 48, 64], [16, 24], [1, 2, 3])
    """
    step = step if step % multiple == 0 else multiple
    return sorted({min(max(-(-int(f * width) // step), 1) * step, width) for f in FRACTIONS})


def stair(time_of: Callable[[int], float], width: int, candidates: Sequence[int] = (64, 32, 16, 8, 4)) -> int:
    r"""Width of the stairs of the latency as a function of the channels.

    Kernels work on blocks of channels, so a layer of 33 can cost what one of 48 costs. A stair of s channels is
    accepted if, for a stair that ends at a small multiple w of it, the first channel costs most of the whole stair:

    .. math:: t(w - s + 1) - t(w - s) \ge \tfrac23 (t(w) - t(w - s)) > 0

    Args:
        time_of: latency by number of channels; must work from 1 to ``width``.
        width: most channels.
        candidates: widths of stairs to try, largest first.

    Returns:
        The largest that fits, else 1.

    Example:
        >>> stair(lambda c: -(-c // 16), 64), stair(float, 64)
        (16, 1)
    """
    for s in candidates:
        top = min(width, max(2 * s, 64)) // s * s  # small: a stair of a wide layer is lost in the noise
        if top < 2 * s:
            continue
        below, first, last = time_of(top - s), time_of(top - s + 1), time_of(top)
        if last > 1.02 * below and first - below >= 2 / 3 * (last - below):
            return s
    return 1


def monotone(times: ArrayLike) -> Floats:
    """Times that never fall when a width grows: the mean of the least such from above and the largest from below.

    What is monotone already stays; noise is shared between the two sides.

    Args:
        times: shape (I, O), in rising widths.
    """
    t = np.asarray(times, np.float64)
    above = np.maximum.accumulate(np.maximum.accumulate(t, 0), 1)
    below = np.minimum.accumulate(np.minimum.accumulate(t[::-1, ::-1], 0), 1)[::-1, ::-1]
    return (above + below) / 2


@dataclass(frozen=True)
class Grid:
    """Times of one layer.

    Attributes:
        inputs: input channels, ascending, length I; ``[1]`` for layers that have outputs only.
        outputs: output channels, ascending, length O.
        ms: milliseconds, shape (I, O).
        steps: width of the stairs on both sides.
    """

    inputs: list[int]
    outputs: list[int]
    ms: list[list[float]]
    steps: tuple[int, int] = (1, 1)


class Surfaces:
    """Bilinear interpolation in many grids at once, on widths rounded up to the end of their stair.

    Exact at the grid points and monotone in both widths; a width of 0 costs nothing.

    Args:
        grids: one per layer.

    Example:
        >>> surfaces = Surfaces([Grid([8, 16], [16, 32], [[1.0, 2.0], [2.0, 4.0]], (1, 16))])
        >>> [float(surfaces(np.array([0]), np.array([i]), np.array([o]))[0]) for i, o in ((8, 32), (12, 32), (8, 17))]
        [2.0, 3.0, 2.0]
    """

    def __init__(self, grids: Sequence[Grid]) -> None:
        sizes = [max(2, *(len(k) for k in (g.inputs, g.outputs))) for g in grids]
        k = max(sizes, default=2)
        self._in = np.array([_padded(g.inputs, k) for g in grids], np.float64).reshape(-1, k)
        self._out = np.array([_padded(g.outputs, k) for g in grids], np.float64).reshape(-1, k)
        self._ms = np.zeros((len(grids), k, k))
        for n, g in enumerate(grids):
            self._ms[n] = np.pad(monotone(g.ms), ((0, k - len(g.inputs)), (0, k - len(g.outputs))), mode="edge")
        self._steps = np.array([g.steps for g in grids], np.float64).reshape(-1, 2)

    def __call__(self, layers: Ints, inputs: ArrayLike, outputs: ArrayLike) -> Floats:
        """Milliseconds of ``layers`` (positions in the grids) at the given widths; all of shape (N,)."""
        c_in, c_out = np.asarray(inputs, np.float64), np.asarray(outputs, np.float64)
        i, t = _place(self._in[layers], c_in, self._steps[layers, 0])
        o, s = _place(self._out[layers], c_out, self._steps[layers, 1])
        ms = self._ms[layers]
        n = np.arange(len(layers))
        low = ms[n, i, o] * (1 - s) + ms[n, i, o + 1] * s
        high = ms[n, i + 1, o] * (1 - s) + ms[n, i + 1, o + 1] * s
        return np.where((c_in <= 0) | (c_out <= 0), 0.0, low * (1 - t) + high * t)


def _padded(values: Sequence[int], k: int) -> list[int]:
    return [*values, *[values[-1]] * (k - len(values))]


def _place(knots_of: Floats, widths: Floats, steps: Floats) -> tuple[Ints, Floats]:
    """Interval of every width among its knots, and where in it."""
    c = np.minimum(np.ceil(widths / steps - 1e-9) * steps, knots_of[:, -1])
    at = np.clip((knots_of < c[:, None]).sum(1) - 1, 0, knots_of.shape[1] - 2)
    n = np.arange(len(c))
    low, high = knots_of[n, at], knots_of[n, at + 1]
    inside = (c - low) / np.where(high > low, high - low, 1.0)
    return at, np.clip(inside, 0.0, 1.0)


def calibrate(sums: ArrayLike, measured: ArrayLike) -> tuple[float, float]:
    r"""What a network costs beyond its layers.

    .. math:: \min_{o, s \ge 0} \sum_j \left(\frac{o + s\, x_j}{y_j} - 1\right)^2

    Args:
        sums: sum of the layer times x of every network, shape (J,).
        measured: their latency y, shape (J,).

    Returns:
        ``(overhead, scale)``: o in the unit of ``measured``, s.

    Raises:
        ValueError: if there is nothing to fit.

    Example:
        >>> overhead, scale = calibrate([1.0, 2.0, 4.0], [3.0, 5.0, 9.0])
        >>> round(overhead, 6), round(scale, 6)
        (1.0, 2.0)
    """
    from scipy.optimize import nnls

    x, y = np.asarray(sums, np.float64), np.asarray(measured, np.float64)
    if not len(x) or x.shape != y.shape or not (y > 0).all() or not np.isfinite(x).all():
        raise ValueError(f"cannot calibrate layer sums {x.tolist()} on measured latencies {y.tolist()}")
    found: Any = nnls(np.stack([1 / y, x / y], 1), np.ones(len(y)))[0]
    return float(found[0]), float(found[1])
