"""PSAP: weight sparsity, the schedule, widths from sparsities, which filters to mask and which to bring back.

Paper: "Protective Self-Adaptive Pruning to Better Compress DNNs" (arXiv 2303.11881), known to us by its abstract: a
layer's own weight sparsity ratio sets its pruning ratio before every pruning step, and a protective reconstruction
watches gradients so that important filters are not lost. The formulas below are our reading of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ...core.types import Bools, Floats, Ints

__all__ = ["adaptive_widths", "cubic_target", "outliers", "relative_norms", "select_masked", "weight_sparsity"]

LEAST_SPARSITY = 1e-12
"""Stands in for a sparsity of 0, so that such a group goes last but can go."""

FEW = 5
"""Below so many masked filters the median absolute deviation says too little."""


def weight_sparsity(layers: Sequence[Tensor], a: float = 0.25) -> float:
    r"""Weight sparsity ratio of a coupled group.

    .. math:: WSR = \frac{\sum_l \#\{|w| \le \tau_l\}}{\sum_l \# w}, \qquad
              \tau_l = a \sqrt{\operatorname{mean}_l w^2}

    over the weights w of the active filters of every producing layer l. τ is relative to the layer, because a
    convolution in front of a batch norm may have any scale. Gaussian weights of mean 0 give erf(a/√2).

    Args:
        layers: weights of the active filters of each layer, any shape; empty layers count for nothing.
        a: threshold in units of the root mean square. Ours.

    Returns:
        A fraction in [0, 1]; 1 for weights that are all zero, 0 without weights.

    Raises:
        ValueError: for ``a`` that is not positive, or weights that are not finite.

    Example:
        >>> weight_sparsity([torch.tensor([[0.1, 2.0], [0.1, -2.0]])])
        0.5
    """
    if not a > 0:
        raise ValueError(f"a={a} must be positive, e.g. 0.25")
    small, total = 0, 0
    for weights in layers:
        if not weights.numel():
            continue
        w = weights.detach().double()
        rms = w.square().mean().sqrt()
        if not torch.isfinite(rms):
            raise ValueError("weights are not finite; the training has diverged")
        small += int((w.abs() <= a * rms).sum())
        total += w.numel()
    return small / total if total else 0.0


def cubic_target(final: float, step: int, steps: int) -> float:
    """Fraction of the cost that is gone at a prune step: ``final · (1 − (1 − step/steps)³)``, then ``final``.

    Steep at first, when the network can still recover. Source: Zhu and Gupta 2017, "To prune, or not to prune".

    Args:
        final: fraction at the end.
        step: prune step, 1 … ``steps``; 0 gives 0.
        steps: number of prune steps.

    Example:
        >>> [round(cubic_target(0.8, t, 4), 4) for t in range(6)]
        [0.0, 0.4625, 0.7, 0.7875, 0.8, 0.8]
    """
    if steps < 1 or step < 0:
        raise ValueError(f"step {step} of {steps}: there must be at least one step, and it counts from 0")
    return final * (1.0 - (1.0 - min(step / steps, 1.0)) ** 3)


def adaptive_widths(
    sparsity: ArrayLike,
    levels: Sequence[Ints],
    full: ArrayLike,
    fits: Callable[[Ints], bool],
) -> tuple[Ints, float]:
    r"""Units to keep so that ratios follow sparsities and the cost fits.

    .. math:: P_g = \min(\kappa \cdot WSR_g, 1), \qquad u_g = \max\{l \in levels_g : l \le (1 - P_g) U_g\}

    or the lowest level, which is where a largest ratio, floors and protection come in.

    The least κ at which the cost fits is found by bisection; the cost falls with κ. Equal sparsities move together
    and jump over the limit, so units then come back one level at a time, that with the largest rest
    :math:`(1 - P_g) U_g - u_g` first, until no further one fits. With a cost that rises with every width, one that
    does not fit never will.

    Args:
        sparsity: WSR per group, shape (G,).
        levels: per group the admissible numbers of units, ascending.
        full: units U of the dense network, shape (G,).
        fits: whether units of shape (G,) keep every limit; false for more units if false for fewer.

    Returns:
        ``(units, κ)``: units int64, shape (G,).

    Raises:
        ValueError: if not even the lowest levels fit, or a sparsity is outside [0, 1].

    Example:
        >>> levels = [np.arange(1, 11), np.arange(1, 11)]
        >>> adaptive_widths([0.2, 0.4], levels, [10, 10], lambda u: u.sum() <= 14)[0].tolist()
        [8, 6]
    """
    wsr = np.asarray(sparsity, np.float64)
    if not ((wsr >= 0) & (wsr <= 1)).all():
        raise ValueError(f"weight sparsity ratios {wsr.tolist()} must be in [0, 1]")
    wsr = np.maximum(wsr, LEAST_SPARSITY)
    size = np.asarray(full, np.float64)
    floor = np.array([lv[0] for lv in levels], np.int64)
    if not fits(floor):
        raise ValueError("the limits cannot be kept: the lowest admissible widths cost more")

    def wanted(kappa: float) -> Floats:
        return size * (1.0 - np.minimum(kappa * wsr, 1.0))

    def units_at(kappa: float) -> Ints:
        pairs = zip(levels, wanted(kappa), strict=True)
        return np.array([lv[max(int(np.searchsorted(lv, x + 1e-9, "right")) - 1, 0)] for lv, x in pairs], np.int64)

    low, high = 0.0, 1.0 / float(wsr.min(initial=1.0))
    if fits(units_at(low)):
        high = low
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if fits(units_at(middle)) else (middle, high)
    goal, units = wanted(high), units_at(high)
    level = np.array([int(np.searchsorted(lv, u)) for lv, u in zip(levels, units, strict=True)])
    open_ = np.array([k + 1 < len(lv) for k, lv in zip(level, levels, strict=True)], bool)
    while open_.any():
        g = int(np.where(open_, goal - units, -np.inf).argmax())
        more = units.copy()
        more[g] = levels[g][level[g] + 1]
        if not fits(more):
            open_[g] = False
            continue
        units, level[g] = more, level[g] + 1
        open_[g] = level[g] + 1 < len(levels[g])
    return units, high


def relative_norms(layers: Sequence[tuple[Tensor, Tensor]], n_units: int) -> Floats:
    r"""Size of every unit: the L2 norms of its filters, relative to the mean norm in their layer, averaged.

    Args:
        layers: per producing layer ``(filters, units)``: shape (m, fan_in), and the unit of each, shape (m,).
        n_units: number of units U.

    Returns:
        float64, shape (U,); 0 where a layer is all zero.

    Example:
        >>> relative_norms([(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.tensor([0, 1]))], 2).tolist()
        [1.6666666666666667, 0.3333333333333333]
    """
    total, count = np.zeros(n_units), np.zeros(n_units)
    for filters, units in layers:
        norms = filters.detach().double().flatten(1).norm(dim=1).cpu().numpy()
        index = units.cpu().numpy()
        mean = norms.mean() if len(norms) else 0.0
        total += np.bincount(index, norms / mean if mean > 0 else norms * 0.0, n_units)
        count += np.bincount(index, minlength=n_units)
    if not np.isfinite(total).all():
        raise ValueError("filter norms are not finite; the training has diverged")
    return total / np.maximum(count, 1)


def select_masked(norms: ArrayLike, masked: Bools, protected: Bools, count: int) -> Bools:
    """Which units to mask: those masked already, then those of least norm; protected ones never.

    A masked filter is not trained, so its norm is old; that it stays masked unless the ratio falls or the pulse
    restores it is our choice.

    Args:
        norms: size of every unit, shape (U,).
        masked: masked now, shape (U,).
        protected: must stay, shape (U,).
        count: units to mask.

    Returns:
        The new mask, shape (U,), with exactly ``count`` true entries; ties go by position.

    Raises:
        ValueError: if fewer than ``count`` units are unprotected.

    Example:
        >>> free = np.zeros(4, bool)
        >>> select_masked([3.0, 1.0, 2.0, 4.0], free, np.array([False, True, False, False]), 2).tolist()
        [True, False, True, False]
    """
    size = np.asarray(norms, np.float64)
    order = [int(u) for u in np.lexsort((size, ~masked)) if not protected[u]]
    if not 0 <= count <= len(order):
        raise ValueError(f"{count} units are to be masked, {len(order)} of {len(size)} are unprotected")
    result = np.zeros(len(size), bool)
    result[order[:count]] = True
    return result


def outliers(gradients: ArrayLike, masked: Bools) -> Ints:
    r"""Masked units whose gate the loss wants to open: the strongest first.

    With G the mean of :math:`|\partial L / \partial gate|` over the pulse, m its median over the masked units and
    MAD their median absolute deviation, a masked unit is an outlier if

    .. math:: G > m + 3 \cdot 1.4826 \cdot MAD

    (1.4826 makes the MAD a standard deviation for Gaussian data). With fewer than five masked units: if G > 3 m; with
    one or two, m is the median over all units of the group, as of two values none exceeds three times their median.
    At most max(1, ⌊U/10⌋) units are returned. A test by mean and standard deviation could never fire with five
    values or fewer.

    Args:
        gradients: G per unit, non-negative, shape (U,).
        masked: shape (U,).

    Returns:
        Units, int64, by falling G.

    Example:
        >>> outliers([0.1, 9.0, 0.2, 0.1, 0.15, 7.0], np.array([True, True, True, True, True, False])).tolist()
        [1]
    """
    g = np.asarray(gradients, np.float64)
    found = np.flatnonzero(masked)
    if not len(found):
        return found.astype(np.int64)
    values = g[found]
    median = float(np.median(values if len(values) > 2 else g))
    spread = 3 * 1.4826 * float(np.median(np.abs(values - median)))
    limit = 3 * median if len(values) < FEW else median + spread
    over = found[values > limit]
    strongest = over[np.argsort(-g[over], kind="stable")]
    return strongest[: max(1, len(g) // 10)].astype(np.int64)
