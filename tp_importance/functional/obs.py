r"""Structured optimal brain surgeon: the elimination order that counts the refit of the readers.

A reader with weight W (O × d, rows scaled by the gain g of the batch norm behind) sees inputs of covariance P. When
the features R go and the others are refitted by least squares (with ridge ε, see :mod:`.refit`), the output changes by

.. math:: L(R) = \operatorname{tr}\bigl(W_R\,[(\hat P^{-1})_{RR}]^{-1} W_R^\top\bigr), \qquad \hat P = P + \varepsilon I

the ridge term :math:`\varepsilon \|\Delta W\|^2` included. With :math:`B = \hat P^{-1}` and :math:`Q = W^\top W` unit i
costs :math:`\operatorname{tr}(Q_{ii} B_{ii}^{-1})`, and removing it maps

.. math:: B \leftarrow B - F F^\top, \quad Q \leftarrow Q - K F^\top - F K^\top, \quad
          F = B_{:i} L^{-\top},\; K = Q_{:i} L^{-\top} - \tfrac12 F L^{-1} Q_{ii} L^{-\top},\; B_{ii} = L L^\top

This is a Cholesky factorisation of B with the units as pivots, so it is backward stable, and the outputs enter by Q
alone. Updates are kept back and applied in panels. Sources: optimal brain surgeon (Hassibi and Stork 1993), its
structured form in ZipLM (arXiv 2302.04089); the Gram form and the sum over readers are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .reader import Elimination, first_of_least

__all__ = ["ReadUnits", "eliminate_with_refit"]

RIDGE = 1e-3
"""Ridge relative to the mean variance of a reader's features."""

PANEL = 128
"""Columns of updates that are kept back before they are applied."""


@dataclass(frozen=True, eq=False)
class ReadUnits:
    r"""How one reader (one conv group of it) reads the units of a group.

    Attributes:
        covariance: P, shape (d, d), or (Z, d, d) for Z independent problems with the same units.
        weight: W, scaled by the gain, shape (O, d) or (Z, O, d).
        units: unit of every feature, shape (d,), int64; -1 for features that stay and help to compensate.
        factor: what its losses are multiplied with.
    """

    covariance: Tensor
    weight: Tensor
    units: Tensor
    factor: float = 1.0


def eliminate_with_refit(
    readers: Sequence[ReadUnits],
    n_units: int,
    *,
    ridge: float = RIDGE,
    first: Sequence[int] = (),
    tie_break: NDArray[np.float64] | None = None,
) -> Elimination:
    r"""Remove units one at a time, least increase of :math:`\sum_r f_r L_r(R)` first, readers refitted after each.

    O(m³) per reader with m features of the group, two m × m float64 matrices; no loop over pairs.

    Args:
        readers: who reads the units.
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
    blocks = [b for r in readers for b in [_block(r, alive, ridge)] if b is not None]
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
        total += max(price[unit], 0.0)
        order[step], loss[n_units - step - 1] = unit, total
        alive[unit] = False
        for block in blocks:
            block.remove(unit)
    return Elimination(order, loss)


class _Block:
    """B and Q of one reader, the updates that are still to be applied, and the diagonal blocks as they are now."""

    def __init__(self, inverse: Tensor, gram: Tensor, units: NDArray[np.int64], factor: float) -> None:
        self.units, self.factor = units, factor
        self.taps = inverse.shape[-1] // len(units)
        self.inverse, self.gram = inverse, gram
        self._begin()

    def _begin(self) -> None:
        """Nothing is pending."""
        z, m, k = len(self.inverse), self.inverse.shape[-1], self.taps
        self.alive = np.ones(len(self.units), bool)
        self.where = {int(u): i for i, u in enumerate(self.units)}
        columns = min(max(PANEL // k, 1) * k, m)
        self.f, self.k = self.inverse.new_zeros(2, z, m, columns)
        self.pending = 0
        self.b_diagonal, self.q_diagonal = (
            x.view(z, len(self.units), k, len(self.units), k).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).clone()
            for x in (self.inverse, self.gram)
        )

    def prices(self) -> NDArray[np.float64]:
        """Loss of every unit that is left; shape (len(units),)."""
        if self.taps == 1:
            price = (self.q_diagonal / self.b_diagonal).flatten(1)
        else:
            factor = torch.linalg.cholesky_ex(self.b_diagonal)[0]
            price = torch.cholesky_solve(self.q_diagonal, factor).diagonal(dim1=-2, dim2=-1).sum(-1)
        return price.sum(0).cpu().numpy() * self.factor

    def remove(self, unit: int) -> None:
        """Refit without ``unit``, if it is read here."""
        i = self.where.get(unit)
        if i is None:
            return
        z, k, n = len(self.inverse), self.taps, self.pending
        rows = slice(i * k, (i + 1) * k)
        f, g = self.f[:, :, :n], self.k[:, :, :n]
        b = self.inverse[:, :, rows] - f @ f[:, rows].mT
        q = self.gram[:, :, rows] - g @ f[:, rows].mT - f @ g[:, rows].mT
        factor = torch.linalg.cholesky(b[:, rows])
        new_f = torch.linalg.solve_triangular(factor, b.mT, upper=False).mT
        h = torch.linalg.solve_triangular(factor, q.mT, upper=False).mT
        new_k = h - new_f @ torch.linalg.solve_triangular(factor, h[:, rows], upper=False) / 2
        self.alive[i] = False
        blocks_f, blocks_k = (x.reshape(z, len(self.units), k, k) for x in (new_f, new_k))
        self.b_diagonal -= blocks_f @ blocks_f.mT
        cross = blocks_k @ blocks_f.mT
        self.q_diagonal -= cross + cross.mT
        gone = torch.from_numpy(~self.alive)
        self.b_diagonal[:, gone], self.q_diagonal[:, gone] = torch.eye(k).to(b), 0.0
        self.f[:, :, n : n + k], self.k[:, :, n : n + k] = new_f, new_k
        self.pending += k
        if self.pending == self.f.shape[-1]:
            self._apply()

    def _apply(self) -> None:
        """Apply what is pending and drop the units that are gone."""
        keep = torch.from_numpy(self.alive.repeat(self.taps).nonzero()[0]).to(self.inverse.device)
        self.units = self.units[self.alive]
        f, g = self.f[:, keep], self.k[:, keep]
        self.inverse = self.inverse[:, keep][:, :, keep].baddbmm_(f, f.mT, alpha=-1)
        self.gram = self.gram[:, keep][:, :, keep].baddbmm_(f, g.mT, alpha=-1).baddbmm_(g, f.mT, alpha=-1)
        self._begin()


def _block(reader: ReadUnits, alive: NDArray[np.bool_], ridge: float) -> _Block | None:
    """B and Q over the features of the units, those of one unit side by side; None if it reads nothing of them."""
    p, w = reader.covariance, reader.weight
    p, w = (p, w) if p.dim() == 3 else (p.unsqueeze(0), w.unsqueeze(0))
    units = reader.units.cpu().numpy()
    rest = np.flatnonzero(units < 0)
    mine = np.flatnonzero((units >= 0) & alive[units])
    if not len(mine):
        return None
    mine = mine[np.argsort(units[mine], kind="stable")]
    owners, counts = np.unique(units[mine], return_counts=True)
    index = torch.from_numpy(np.concatenate([rest, mine])).to(p.device)
    p = (p[:, index][:, :, index]).double()
    size = p.diagonal(dim1=1, dim2=2).mean(1)
    p.diagonal(dim1=1, dim2=2).add_((ridge * size).clamp_min(1e-300).unsqueeze(1))
    factor, failed = torch.linalg.cholesky_ex(p)
    if failed.any():
        raise ValueError(f"a covariance of {p.shape[-1]} features is not positive semi-definite; raise ridge={ridge}")
    del p
    inverse = torch.cholesky_inverse(factor[:, len(rest) :, len(rest) :])
    w = w[:, :, torch.from_numpy(mine).to(w.device)].to(inverse)
    gram = w.mT @ w
    most = int(counts.max())
    if (counts < most).any():  # fill up with features that are nobody's: of variance 1, not read
        slot = np.concatenate([i * most + np.arange(c) for i, c in enumerate(counts)])
        at = torch.from_numpy(slot).to(gram.device)
        inverse = _spread(inverse, at, len(owners) * most, 1.0)
        gram = _spread(gram, at, len(owners) * most, 0.0)
    return _Block(inverse, gram, owners, reader.factor)


def _spread(matrix: Tensor, at: Tensor, size: int, diagonal: float) -> Tensor:
    wide = torch.eye(size, dtype=matrix.dtype, device=matrix.device).mul_(diagonal).repeat(len(matrix), 1, 1)
    wide[:, at.unsqueeze(1), at] = matrix
    return wide
