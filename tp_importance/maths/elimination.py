r"""Structured optimal brain surgeon: the elimination order that counts the refit of the consumers.

A consumer with weight W (O × d, rows scaled by the gain g of the batch norm behind) sees inputs of covariance P. When
the features R go and the others are refitted (with ridge ε, see :mod:`.least_squares`), the output changes by

.. math:: L(R) = \operatorname{tr}\bigl(W_R\,[(\hat P^{-1})_{RR}]^{-1} W_R^\top\bigr), \qquad \hat P = P + \varepsilon I

the ridge term :math:`\varepsilon \|\Delta W\|^2` included. With :math:`B = \hat P^{-1}` and :math:`Q = W^\top W` unit i
costs :math:`\operatorname{tr}(Q_{ii} B_{ii}^{-1})`, and removing it maps

.. math:: B \leftarrow B - F F^\top, \quad Q \leftarrow Q - K F^\top - F K^\top, \quad
          F = B_{:i} L^{-\top},\; K = Q_{:i} L^{-\top} - \tfrac12 F L^{-1} Q_{ii} L^{-\top},\; B_{ii} = L L^\top

With a metric M of its own the loss is :math:`\operatorname{tr}(\Delta W M \Delta W^\top)`; then N = BMB and
:math:`Z = \operatorname{sym}(W^\top \Delta W M B)` follow in the same way and unit i costs
:math:`\operatorname{tr}(B_{ii}^{-1} N_{ii} B_{ii}^{-1} Q_{ii} + 2 B_{ii}^{-1} Z_{ii})`.

This is a Cholesky factorisation of B with the units as pivots, so it is backward stable, and the outputs enter by Q
alone. Updates are kept back and applied in panels. Sources: optimal brain surgeon (Hassibi and Stork 1993), its
structured form in ZipLM (arXiv 2302.04089); the Gram form and the sum over consumers are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .moments import Elimination, first_of_least

__all__ = ["ReadUnits", "eliminate_with_refit"]

RIDGE = 1e-3
"""Ridge relative to the mean variance of a consumer's features."""

PANEL = 128
"""Columns of updates that are kept back before they are applied."""


@dataclass(frozen=True, eq=False)
class ReadUnits:
    r"""How one consumer (one conv group of it) reads the units of a group.

    Attributes:
        covariance: P, shape (d, d), or (Z, d, d) for Z independent problems with the same units.
        weight: W, scaled by the gain, shape (O, d) or (Z, O, d).
        units: unit of every feature, shape (d,), int64; -1 for features that stay and help to rebuild the others.
        factor: what its losses are multiplied with.
        metric: M, as P: the refit stays that of P, but what it leaves is measured by M. Default: :math:`\\hat P`.
    """

    covariance: Tensor
    weight: Tensor
    units: Tensor
    factor: float = 1.0
    metric: Tensor | None = None


def eliminate_with_refit(
    consumers: Sequence[ReadUnits],
    n_units: int,
    *,
    ridge: float = RIDGE,
    first: Sequence[int] = (),
    tie_break: NDArray[np.float64] | None = None,
) -> Elimination:
    r"""Remove units one at a time, least increase of :math:`\sum_r f_r L_r(R)` first, consumers refitted after each.

    O(m³) per consumer with m features of the group, two m × m float64 matrices; no loop over pairs.

    Args:
        consumers: who reads the units.
        n_units: U.
        ridge: ε relative to the mean of diag P, > 0.
        first: units that go first at no loss, in this order: those that do not vary.
        tie_break: second key, e.g. weight norms; the smaller goes first. Shape (U,).

    Returns:
        order and loss with c units left, shapes (U,) and (U + 1,); every loss is that of a direct refit.

    Raises:
        ValueError: if ``ridge`` is not positive, or a covariance is not positive semi-definite.

    Example:
        Unit 1 is twice unit 0, so either goes for (nearly) nothing; unit 2 has energy 1.

        >>> x = torch.randn(100, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        >>> u = torch.stack([x[:, 0], 2 * x[:, 0], x[:, 1]], 1)
        >>> read = ReadUnits(torch.cov(u.T), torch.eye(3, dtype=torch.float64), torch.arange(3))
        >>> e = eliminate_with_refit([read], 3, ridge=1e-9)
        >>> bool(e.loss[2] < 1e-6), bool(e.loss[1] > 0.5)
        (True, True)
    """
    if not ridge > 0:
        raise ValueError(f"ridge={ridge!r} must be above 0, e.g. {RIDGE}")
    alive = np.ones(n_units, bool)
    alive[list(first)] = False
    blocks = [b for r in consumers for b in [_block(r, alive, ridge)] if b is not None]
    preference = np.arange(n_units) if tie_break is None else np.lexsort((np.arange(n_units), tie_break)).argsort()
    order, loss, total = np.empty(n_units, np.int64), np.zeros(n_units + 1), 0.0
    order[: len(first)] = first
    tolerance = 0.0
    for step in range(len(first), n_units):
        price = np.zeros(n_units)
        for block in blocks:
            price[block.units] += block.prices()
        tolerance = max(tolerance, 1e-10 * float(price[alive].max()))
        unit = first_of_least(price, alive, preference, tolerance)
        total += price[unit]
        order[step], loss[n_units - step - 1] = unit, total
        alive[unit] = False
        for block in blocks:
            block.remove(unit)
    return Elimination(order, loss)


class _Pending:
    r"""A symmetric matrix :math:`X - UV^\top - VU^\top` of blocks per unit, of which X is stored and U, V kept back.

    Without V: :math:`X - UU^\top`. The diagonal blocks, shape (Z, U, k, k), are always those of the whole.
    """

    def __init__(self, matrix: Tensor, taps: int) -> None:
        self.matrix, self.taps = matrix, taps
        self.u: list[Tensor] = []
        self.v: list[Tensor] = []
        z, n = len(matrix), matrix.shape[-1] // taps
        self.diagonal = matrix.view(z, n, taps, n, taps).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).clone()

    def columns(self, rows: slice) -> Tensor:
        """Columns of the whole, shape (Z, m, k)."""
        found = self.matrix[:, :, rows].clone()
        for u, v in zip(self.u, self.v, strict=True):
            found.baddbmm_(u, v[:, rows].mT, alpha=-1)
            if v is not u:
                found.baddbmm_(v, u[:, rows].mT, alpha=-1)
        return found

    def subtract(self, u: Tensor, v: Tensor | None = None) -> None:
        """Subtract U Uᵀ or U Vᵀ + V Uᵀ, shapes (Z, m, k)."""
        self.u.append(u)
        self.v.append(u if v is None else v)
        left, right = (x[-1].reshape(len(u), -1, self.taps, u.shape[-1]) for x in (self.u, self.v))
        change = left @ right.mT
        self.diagonal -= change if v is None else change + change.mT

    def forget(self, gone: Tensor, value: float) -> None:
        """Diagonal blocks of units that are gone become ``value`` times the identity: they price at nothing."""
        self.diagonal[:, gone] = torch.eye(self.taps, dtype=self.matrix.dtype, device=gone.device).mul_(value)

    def applied(self, keep: Tensor) -> _Pending:
        """The rows and columns ``keep`` of the whole."""
        matrix = self.matrix[:, keep][:, :, keep]
        own = [u[:, keep] for u, v in zip(self.u, self.v, strict=True) if v is u]
        pairs = [(u[:, keep], v[:, keep]) for u, v in zip(self.u, self.v, strict=True) if v is not u]
        if own:
            u = torch.cat(own, 2)
            matrix.baddbmm_(u, u.mT, alpha=-1)
        if pairs:
            u, v = (torch.cat(x, 2) for x in zip(*pairs, strict=True))
            matrix.baddbmm_(u, v.mT, alpha=-1).baddbmm_(v, u.mT, alpha=-1)
        return _Pending(matrix, self.taps)


class _Block:
    """B, Q, and with a metric N and Z, of one consumer, over the units that are left or went lately."""

    def __init__(self, matrices: Sequence[Tensor], units: NDArray[np.int64], factor: float) -> None:
        self.factor = factor
        self.taps = matrices[0].shape[-1] // len(units)
        self._begin([_Pending(x, self.taps) for x in matrices], units)

    def _begin(self, matrices: list[_Pending], units: NDArray[np.int64]) -> None:
        self.matrices, self.units, self.pending = matrices, units, 0
        self.alive = np.ones(len(units), bool)
        self._prices: NDArray[np.float64] | None = None
        self.where = {int(u): i for i, u in enumerate(units)}

    def prices(self) -> NDArray[np.float64]:
        """Loss of every unit that is left; shape (len(units),)."""
        if self._prices is not None:  # nothing went here since
            return self._prices
        b, q, *weighted = (x.diagonal for x in self.matrices)
        factor = torch.linalg.cholesky_ex(b)[0]
        solved = torch.cholesky_solve(q, factor)
        if weighted:
            n, z = (torch.cholesky_solve(x, factor) for x in weighted)
            solved = n @ solved + 2 * z
        price = solved.diagonal(dim1=-2, dim2=-1).sum((0, 2))
        self._prices = price.cpu().numpy() * self.factor
        return self._prices

    def remove(self, unit: int) -> None:
        """Refit without ``unit``, if it is read here."""
        i = self.where.get(unit)
        if i is None:
            return
        rows = slice(i * self.taps, (i + 1) * self.taps)
        columns = [x.columns(rows) for x in self.matrices]
        factor = torch.linalg.cholesky(columns[0][:, rows])
        f, *halves = (_right(c, factor) for c in columns)

        def turned(h: Tensor) -> Tensor:
            return h - f @ torch.linalg.solve_triangular(factor, h[:, rows], upper=False) / 2

        b, q, *weighted = self.matrices
        b.subtract(f)
        q.subtract(turned(halves[0]), f)
        if weighted:
            n, z = weighted
            h_q, h_n, h_z = halves
            n.subtract(turned(h_n), f)
            z.subtract(-h_q / 2, h_n)
            cross = h_q @ h_n[:, rows].mT + h_n @ h_q[:, rows].mT
            z.subtract(turned(h_z + _right(cross, factor) / 2), f)
        self.alive[i], self._prices = False, None
        gone = torch.from_numpy(~self.alive)
        for x in self.matrices:
            x.forget(gone.to(f.device), float(x is b))
        self.pending += self.taps
        if self.pending >= PANEL and self.alive.any():
            keep = torch.from_numpy(self.alive.repeat(self.taps).nonzero()[0]).to(f.device)
            self._begin([x.applied(keep) for x in self.matrices], self.units[self.alive])


def _right(columns: Tensor, factor: Tensor) -> Tensor:
    """``columns`` times the inverse transpose of the lower triangular ``factor``."""
    return torch.linalg.solve_triangular(factor, columns.mT, upper=False).mT


def _block(consumer: ReadUnits, alive: NDArray[np.bool_], ridge: float) -> _Block | None:
    """B and Q over the features of the units, those of one unit side by side; None if it reads nothing of them."""
    p, w = _batched(consumer.covariance), _batched(consumer.weight)
    metric = None if consumer.metric is None else _batched(consumer.metric)
    units = consumer.units.cpu().numpy()
    rest = np.flatnonzero(units < 0)
    mine = np.flatnonzero((units >= 0) & alive[units])
    if not len(mine):
        return None
    mine = mine[np.argsort(units[mine], kind="stable")]
    owners, counts = np.unique(units[mine], return_counts=True)
    index = torch.from_numpy(np.concatenate([rest, mine])).to(p.device)
    p = p[:, index][:, :, index].double()
    size = p.diagonal(dim1=1, dim2=2).mean(1)
    p.diagonal(dim1=1, dim2=2).add_((ridge * size).clamp_min(1e-300).unsqueeze(1))
    factor, failed = torch.linalg.cholesky_ex(p)
    if failed.any():
        raise ValueError(f"a covariance of {p.shape[-1]} features is not positive semi-definite; raise ridge={ridge}")
    del p
    own = slice(len(rest), None)
    w = w[:, :, torch.from_numpy(mine).to(w.device)].to(factor)
    gram = w.mT @ w
    if metric is None:
        matrices = [torch.cholesky_inverse(factor[:, own, own]), gram]
    else:
        inverse = torch.cholesky_inverse(factor)[:, :, own]
        weighted = inverse.mT @ metric[:, index][:, :, index].to(inverse) @ inverse
        matrices = [inverse[:, own].contiguous(), gram, weighted, torch.zeros_like(gram)]
    most = int(counts.max())
    if (counts < most).any():  # fill up with features that are nobody's: of variance 1, not read
        slot = np.concatenate([i * most + np.arange(c) for i, c in enumerate(counts)])
        at = torch.from_numpy(slot).to(gram.device)
        matrices = [_spread(x, at, len(owners) * most, float(i == 0)) for i, x in enumerate(matrices)]
    return _Block(matrices, owners, consumer.factor)


def _batched(matrix: Tensor) -> Tensor:
    matrix = matrix.cpu() if matrix.device.type == "mps" else matrix  # MPS has no float64
    return matrix if matrix.dim() == 3 else matrix.unsqueeze(0)


def _spread(matrix: Tensor, at: Tensor, size: int, diagonal: float) -> Tensor:
    wide = torch.eye(size, dtype=matrix.dtype, device=matrix.device).mul_(diagonal).repeat(len(matrix), 1, 1)
    wide[:, at.unsqueeze(1), at] = matrix
    return wide
