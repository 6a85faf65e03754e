r"""Scatter where the next layer reads the channels, and backward elimination in it (CATRO, ``space="consumer"``).

A consumer with weight W turns the unfolded input u (one entry per channel and kernel tap) into Wᵀu. Channel i
contributes :math:`c_{i,o} = \sum_a W_{o,(i,a)} u_{(i,a)}` to output o, and the batch norm behind scales output o
by :math:`g_o = \gamma_o / \sqrt{\sigma_o^2 + \epsilon}`. Everything below needs the inputs only through their
second moments, so one matrix per consumer serves every group, every class weight and every budget. Ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "NEGLIGIBLE",
    "Elimination",
    "Moments",
    "consumer_scatter",
    "eliminate",
    "elimination_loss",
    "first_of_least",
]

NEGLIGIBLE = 1e-12
"""Channels with less than this fraction of the largest energy carry nothing."""


@dataclass
class Moments:
    r"""Streaming first and second moments of rows u with class labels; merging is exact.

    Sums are kept in float64 about a fixed ``shift`` (the mean of the first batch), which removes the cancellation
    of :math:`\sum uu^\top - n\,mm^\top` when means are large. Rows are held back until there are half as many as
    features: adding a d × d product for every small batch would take longer than the products.

    Attributes:
        shift: shape (G, d) for G independent blocks (conv groups of the consumer).
        class_sums: :math:`\sum_{k} (u-s)` per class, shape (K, G, d).
        class_rows: rows per class, shape (K,).

    Example:
        >>> x = torch.randn(100, 1, 3, dtype=torch.float64)
        >>> y = torch.arange(100) % 2
        >>> whole = Moments().update(x, y)
        >>> halves = Moments().update(x[:50], y[:50]).merge(Moments().update(x[50:], y[50:]))
        >>> torch.allclose(whole.total(), halves.total())
        True
    """

    shift: Tensor | None = None
    class_sums: Tensor | None = None
    class_rows: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64, device="cpu"))

    _second: Tensor | None = field(default=None, repr=False)
    _held: list[Tensor] = field(default_factory=list, repr=False)

    @property
    def rows(self) -> float:
        """Rows seen."""
        return float(self.class_rows.sum())

    @property
    def second(self) -> Tensor | None:
        r""":math:`\sum (u-s)(u-s)^\top`, shape (G, d, d); None before the first row."""
        self._add_held()
        return self._second

    def _add_held(self) -> None:
        if not self._held:
            return
        rows = torch.cat(self._held) if len(self._held) > 1 else self._held[0]
        self._held.clear()
        product = _gram(rows)
        assert self.shift is not None
        self._second = product.to(self.shift) if self._second is None else self._second.add_(product)

    def update(self, u: Tensor, labels: Tensor) -> Moments:
        """Add rows ``u`` of shape (R, G, d) with class ``labels`` of shape (R,); returns self."""
        if not len(u):
            return self
        if self.shift is None:
            self.shift = u.mean(0).to(torch.float32 if u.device.type == "mps" else torch.float64)
            self.class_sums = self.shift.new_zeros(0, *u.shape[1:])
            self.class_rows = self.shift.new_zeros(0)
        assert self.class_sums is not None
        centred = u - self.shift.to(u.dtype)
        self._held.append(centred)
        if sum(map(len, self._held)) >= u.shape[2]:
            self._add_held()
        self._grow(int(labels.max()) + 1)
        sums = centred.new_zeros(self.class_sums.shape).index_add_(0, labels, centred)
        self.class_sums += sums
        self.class_rows += torch.bincount(labels, minlength=len(self.class_rows)).to(self.class_rows)
        return self

    def merge(self, other: Moments) -> Moments:
        """Add what ``other`` has seen; returns self."""
        if other.shift is None:
            return self
        if self.shift is None:
            self.shift, self._second = other.shift.clone(), other.second.clone()  # type: ignore[union-attr]
            self.class_sums, self.class_rows = other.class_sums.clone(), other.class_rows.clone()  # type: ignore[union-attr]
            return self
        assert self.second is not None and self.class_sums is not None
        assert other.second is not None and other.class_sums is not None
        # (u - s) = (u - s') + (s' - s): move the other's sums to our shift
        d = other.shift - self.shift
        total = other.class_sums.sum(0)
        cross = torch.einsum("gd,ge->gde", total, d)
        self.second.add_(other.second + cross + cross.mT + other.rows * torch.einsum("gd,ge->gde", d, d))
        k = len(other.class_rows)
        self._grow(k)
        self.class_sums[:k] += other.class_sums + other.class_rows.view(-1, 1, 1) * d
        self.class_rows[:k] += other.class_rows
        return self

    def mean(self) -> Tensor:
        """Mean row, shape (G, d)."""
        assert self.shift is not None and self.class_sums is not None
        return self.shift + self.class_sums.sum(0) / self.rows

    def total(self) -> Tensor:
        r"""Covariance :math:`\frac1n\sum (u-m)(u-m)^\top`, shape (G, d, d)."""
        assert self.second is not None and self.class_sums is not None
        covariance = self.second / self.rows
        for block, m in zip(covariance, self.class_sums.sum(0) / self.rows, strict=True):
            block.addr_(m, m, alpha=-1)
        return covariance

    def between(self) -> Tensor:
        r"""Between-class part :math:`\frac1n\sum_k n_k (m_k-m)(m_k-m)^\top`, shape (G, d, d)."""
        assert self.class_sums is not None
        seen = self.class_rows > 0
        n_k = self.class_rows[seen]
        means = self.class_sums[seen] / n_k.view(-1, 1, 1)
        deviations = means - self.class_sums.sum(0) / self.rows
        weighted = deviations * (n_k / self.rows).view(-1, 1, 1)
        return torch.einsum("kgd,kge->gde", weighted, deviations)

    def _grow(self, classes: int) -> None:
        assert self.class_sums is not None
        missing = classes - len(self.class_rows)
        if missing > 0:
            self.class_sums = torch.cat(
                [self.class_sums, self.class_sums.new_zeros(missing, *self.class_sums.shape[1:])]
            )
            self.class_rows = torch.cat([self.class_rows, self.class_rows.new_zeros(missing)])


HALVED = 256
"""Features above which a Gram is put together from blocks, of which those below the diagonal need not be computed."""


def _gram(rows: Tensor) -> Tensor:
    """Gram of each conv group, rows (R, G, d)."""
    if rows.shape[1] > 1:
        return torch.einsum("rgd,rge->gde", rows, rows)
    gram = rows.new_empty(1, rows.shape[2], rows.shape[2])
    _write_gram(rows.flatten(1), gram[0])
    return gram


def _write_gram(rows: Tensor, into: Tensor) -> None:
    d = rows.shape[1]
    if d <= HALVED:
        torch.mm(rows.mT, rows, out=into)
        return
    h = d // 2
    _write_gram(rows[:, :h], into[:h, :h])
    _write_gram(rows[:, h:], into[h:, h:])
    torch.mm(rows[:, :h].mT, rows[:, h:], out=into[:h, h:])
    into[h:, :h] = into[:h, h:].mT


def consumer_scatter(moments: Tensor, weight: Tensor, gain: Tensor, units: Tensor, n_units: int) -> Tensor:
    r"""Scatter matrix of the units of one group at one consumer.

    .. math:: S_{ij} = \sum_o g_o^2 \sum_{a \in i, b \in j} W_{oa} W_{ob} P_{ab}

    so that :math:`1_R^\top S\, 1_R` is the mean squared change of the consumer's (scaled, centred) output when the
    units R are masked.

    Args:
        moments: P, shape (G, d, d).
        weight: W per conv group, shape (G, O, d).
        gain: g per conv group, shape (G, O).
        units: unit of every feature, -1 where it belongs to another group; shape (G, d), int64.
        n_units: U.

    Returns:
        S, shape (U, U), dtype of ``moments``.

    Example:
        >>> P, W = torch.eye(2).unsqueeze(0), torch.tensor([[[1.0, 2.0]]])
        >>> consumer_scatter(P, W, torch.ones(1, 1), torch.tensor([[0, 1]]), 2).tolist()
        [[1.0, 0.0], [0.0, 4.0]]
    """
    scatter = moments.new_zeros(n_units, n_units)
    # the Gram of the weights is the expensive part: in their own precision, but no less than float32
    weight = weight.to(moments.device, torch.promote_types(weight.dtype, torch.float32))
    for p, w, g, unit in zip(moments, weight, gain.to(weight), units, strict=True):
        mine = (unit >= 0).nonzero().squeeze(1)
        if len(mine) == 0:
            continue
        w, u = w[:, mine] * g.unsqueeze(1), unit[mine]
        product = (w.mT @ w) * (p if len(mine) == len(unit) else p[mine][:, mine])
        rows = product.new_zeros(n_units, len(mine)).index_add_(0, u, product)
        scatter.index_add_(1, u, rows)
    return scatter


@dataclass(frozen=True)
class Elimination:
    """Backward elimination of one group.

    Attributes:
        order: units in the order they go, shape (U,).
        loss: loss when c units are left, shape (U + 1,): ``loss[U] = 0``, ``loss[0]`` everything removed.
    """

    order: NDArray[np.int64]
    loss: NDArray[np.float64]


def eliminate(scatter: Tensor | NDArray[np.float64], tie_break: NDArray[np.float64] | None = None) -> Elimination:
    r"""Remove units one at a time, least increase of :math:`1_R^\top S 1_R` first.

    The next unit costs :math:`S_{ii} + 2\sum_{j \in R} S_{ij}`, which may be negative: duplicates and
    cancellations count. O(U²) in all.

    Args:
        scatter: symmetric S, shape (U, U).
        tie_break: second key, e.g. weight norms; the smaller goes first. Shape (U,).

    Returns:
        :class:`Elimination`.

    Example:
        >>> e = eliminate(np.array([[4.0, 0.0], [0.0, 1.0]]))
        >>> e.order.tolist(), e.loss.tolist()
        ([1, 0], [5.0, 1.0, 0.0])
    """
    s = np.asarray(scatter.detach().cpu().numpy() if isinstance(scatter, Tensor) else scatter, np.float64)
    n = len(s)
    price = s.diagonal().copy()
    preference = np.arange(n) if tie_break is None else np.lexsort((np.arange(n), tie_break)).argsort()
    tolerance = 1e-12 * max(float(np.abs(price).max(initial=0.0)), 1e-300)
    order, loss, total = np.empty(n, np.int64), np.zeros(n + 1), 0.0
    alive = np.ones(n, bool)
    for step in range(n):
        unit = first_of_least(price, alive, preference, tolerance)
        total += price[unit]
        order[step], loss[n - step - 1] = unit, total
        alive[unit] = False
        price += 2.0 * s[unit]
    return Elimination(order, loss)


def first_of_least(
    price: NDArray[np.float64], alive: NDArray[np.bool_], preference: NDArray[np.int64], tolerance: float
) -> int:
    """The preferred unit among those alive whose price is the least up to ``tolerance``.

    Args:
        price: shape (U,).
        alive: units that are left, shape (U,).
        preference: distinct, the least wins, shape (U,).
        tolerance: prices this close are the same.
    """
    candidates = np.where(alive, price, np.inf)
    tied = np.flatnonzero(candidates <= candidates.min() + tolerance)
    return int(tied[preference[tied].argmin()]) if len(tied) > 1 else int(tied[0])


def elimination_loss(scatter: Tensor, removed: Tensor) -> Tensor:
    r"""Loss :math:`1_R^\top S 1_R` of removing ``removed`` together, a scalar."""
    return scatter[removed][:, removed].sum()
