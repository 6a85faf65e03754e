r"""What is left of the consumers while units go, see :mod:`.elimination`.

With :math:`B = \hat P^{-1}`, unit i costs :math:`\operatorname{tr}(W_i B_{ii}^{-1} W_i^\top)`. Removing units R maps

.. math:: B \leftarrow B - X^\top X, \quad W \leftarrow W - T X, \qquad
          X = L^{-1} B_{R:},\; T^\top = L^{-1} W_R^\top,\; B_{RR} = L L^\top

and costs :math:`\|T\|^2`, of which every column of T is the part of one feature after those before it. With a metric M
of its own the loss is :math:`\operatorname{tr}(V M V^\top)` with V what W has changed. Then :math:`N = BMB` and
:math:`Y = B M V^\top` follow in the same way,

.. math:: N \leftarrow N - J^\top X - X^\top J + X^\top C X, \quad
          Y \leftarrow Y - X^\top D - (J - C X)^\top T^\top, \qquad
          J = L^{-1} N_{R:},\; C = L^{-1} N_{RR} L^{-\top},\; D = L^{-1} Y_R

and a step costs :math:`\operatorname{tr}(T C T^\top) - 2 \operatorname{tr}(T D)`. Source: ours, after ZipLM (arXiv
2302.04089). Stored with the features first: W and Y have shape (m, O).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Features", "ImpreciseError", "ReadUnits", "State", "stacked"]

COMPACT = 0.75
"""Rows of units that are gone are dropped once no more than this fraction is left."""


class ImpreciseError(ArithmeticError):
    """The precision does not suffice."""


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


@dataclass(frozen=True, eq=False)
class Features:
    """One consumer over the features that matter: first those that stay, then those of the units, side by side.

    Attributes:
        covariance: P as it came, shape (Z, d, d).
        metric: M as it came.
        weight: of the units' features, times the root of the factor, float64, shape (Z, m, O).
        index: of the features, shape (d',).
        stay: how many of them stay.
        owners: units, ascending, shape (U',).
        counts: their features, shape (U',).
        epsilon: ridge, shape (Z,).
    """

    covariance: Tensor
    metric: Tensor | None
    weight: Tensor
    index: NDArray[np.int64]
    stay: int
    owners: NDArray[np.int64]
    counts: NDArray[np.int64]
    epsilon: Tensor

    @property
    def size(self) -> int:
        """How many features there are."""
        return len(self.index)

    @classmethod
    def of(cls, consumer: ReadUnits, alive: NDArray[np.bool_], ridge: float) -> Features | None:
        """Those of the units that are alive; None if it reads nothing of them."""
        p, w = _batched(consumer.covariance), _batched(consumer.weight)
        units = consumer.units.cpu().numpy()
        rest = np.flatnonzero(units < 0)
        mine = np.flatnonzero((units >= 0) & alive[units])
        if not len(mine):
            return None
        mine = mine[np.argsort(units[mine], kind="stable")]
        owners, counts = np.unique(units[mine], return_counts=True)
        index = np.concatenate([rest, mine])
        variance = p.diagonal(dim1=1, dim2=2)[:, torch.from_numpy(index).to(p.device)].double()
        weight = w[:, :, torch.from_numpy(mine).to(w.device)].to(variance).mT * consumer.factor**0.5
        metric = None if consumer.metric is None else _batched(consumer.metric)
        epsilon = (ridge * variance.mean(1)).clamp_min(1e-300)
        return cls(p, metric, weight, index, len(rest), owners, counts, epsilon)

    def state(self, dtype: torch.dtype) -> State:
        """Where the elimination starts.

        Raises:
            ImpreciseError: if the covariance is not positive definite in ``dtype``.
        """
        own, weight = slice(self.stay, None), self.weight.to(dtype, copy=True)
        factor = self._factor(self.index, dtype)
        if weight.shape[2] > 1.5 * weight.shape[1]:  # only its Gram matters
            weight = torch.linalg.qr(weight.mT, mode="r")[1].mT.contiguous()
        if self.metric is None:
            parts = [torch.cholesky_inverse(factor[:, own, own]), weight]
        else:
            inverse = torch.cholesky_inverse(factor)[:, :, own]
            measured = inverse.mT @ _gathered(self.metric, self.index, dtype) @ inverse
            parts = [inverse[:, own].contiguous(), weight, measured, torch.zeros_like(weight)]
        taps = int(self.counts.max())
        if (self.counts < taps).any():  # fill up with features that are nobody's: of variance 1, not read
            slot = np.concatenate([i * taps + np.arange(c) for i, c in enumerate(self.counts)])
            at, size = torch.from_numpy(slot).to(weight.device), len(self.owners) * taps
            parts = [_spread(x, at, size, square=i % 2 == 0, diagonal=float(i == 0)) for i, x in enumerate(parts)]
        return State(parts, self.owners, taps)

    def loss_without(self, units: NDArray[np.int64]) -> float:
        """What the refit leaves without ``units``, directly, in float64."""
        owner = np.repeat(self.owners, self.counts)
        gone = np.concatenate([np.zeros(self.stay, bool), np.isin(owner, units)])
        kept, mine = self.index[~gone], self.index[gone]
        weight = self.weight[:, torch.from_numpy(gone[self.stay :].nonzero()[0]).to(self.weight.device)]
        rows = [torch.from_numpy(x).to(self.covariance.device) for x in (kept, mine)]
        cross = self.covariance[:, rows[0].unsqueeze(1), rows[1]].to(weight) @ weight
        factor = self._factor(kept, torch.float64)
        if self.metric is None:
            own = _gathered(self.covariance, mine, torch.float64) @ weight + self.epsilon.view(-1, 1, 1) * weight
            return float((weight * own).sum() - _solved(factor, cross).square().sum())
        change = torch.cat([torch.cholesky_solve(cross, factor), -weight], 1)
        metric = _gathered(self.metric, np.concatenate([kept, mine]), torch.float64)
        return float((change * (metric @ change)).sum())

    def _factor(self, index: NDArray[np.int64], dtype: torch.dtype) -> Tensor:
        """Cholesky factor of the covariance of some features, ridge included."""
        p = _gathered(self.covariance, index, dtype)
        p.diagonal(dim1=1, dim2=2).add_(self.epsilon.to(dtype).unsqueeze(1))
        return _cholesky(p, f"a covariance of {len(index)} features is not positive semi-definite")


@dataclass(frozen=True, eq=False)
class Step:
    """Units that may go together.

    Attributes:
        units: those of them that are read here, in order.
        costs: of each after those before it.
        rows: their features there.
        factor: L.
        t: Tᵀ, shape (Z, r, O).
        c: C, with a metric.
        d: D, with a metric.
    """

    units: NDArray[np.int64]
    costs: NDArray[np.float64]
    rows: Tensor
    factor: Tensor
    t: Tensor
    c: Tensor | None = None
    d: Tensor | None = None


class State:
    """B and W, and with a metric N and Y, of consumers of the same form, over the units that are left.

    Args:
        parts: these matrices, shapes (Z, m, m) and (Z, m, O).
        units: read here, with as many features each, side by side; shape (m / taps,).
        taps: features of a unit.
    """

    def __init__(self, parts: Sequence[Tensor], units: NDArray[np.int64], taps: int) -> None:
        self.taps = taps
        self._begin(parts, units)

    def _begin(self, parts: Sequence[Tensor], units: NDArray[np.int64]) -> None:
        self.parts, self.units = list(parts), units
        self._place = np.full(int(units.max(initial=-1)) + 1, -1)  # of a unit that is left; -1 for others
        self._place[units] = np.arange(len(units))

    @property
    def _left(self) -> NDArray[np.bool_]:
        return self._place[self.units] >= 0

    def prices(self) -> NDArray[np.float64]:
        """What each of ``units`` alone costs, 0 for those that are gone."""
        if not len(self.units):
            return np.zeros(0)
        b, w, *weighted = self.parts
        if self.taps == 1:
            diagonal = b.diagonal(dim1=1, dim2=2)
            price = w.square().sum(2) / diagonal
            if weighted:
                n, y = weighted
                price = price * n.diagonal(dim1=1, dim2=2) / diagonal - 2 * (w * y).sum(2) / diagonal
        else:
            own = w.view(len(w), len(self.units), self.taps, -1)
            factor = torch.linalg.cholesky_ex(self._blocks(b))[0]
            solved = torch.cholesky_solve(own @ own.mT, factor)
            if weighted:
                n, y = weighted
                solved = torch.cholesky_solve(self._blocks(n), factor) @ solved
                solved -= 2 * torch.cholesky_solve(y.view_as(own) @ own.mT, factor)
            price = solved.diagonal(dim1=-2, dim2=-1).sum(2)
        return np.where(self._left, price.sum(0).double().cpu().numpy(), 0.0)

    def without(self, units: NDArray[np.int64]) -> Step | None:
        """What ``units`` cost if they go in this order; None if none of them is read here.

        Raises:
            ImpreciseError: if B has lost its definiteness to rounding.
        """
        at = self._place[units[units < len(self._place)]]
        at = at[at >= 0]
        if not len(at):
            return None
        b, w, *weighted = self.parts
        rows = torch.from_numpy((at[:, None] * self.taps + np.arange(self.taps)).ravel()).to(b.device)
        factor = _cholesky(b[:, rows.unsqueeze(1), rows], f"an inverse of {len(b[0])} features lost its precision")
        t, c, d = _solved(factor, w[:, rows]), None, None
        costs = t.square().sum(2)
        if weighted:
            n, y = weighted
            c = _solved(factor, _solved(factor, n[:, rows.unsqueeze(1), rows]).mT)
            d = _solved(factor, y[:, rows])
            shared = (t @ t.mT) * c
            costs = shared.diagonal(dim1=1, dim2=2) + 2 * shared.tril(-1).sum(2) - 2 * (t * d).sum(2)
        per_unit = costs.sum(0).view(-1, self.taps).sum(1).double().cpu().numpy()
        return Step(self.units[at], per_unit, rows, factor, t, c, d)

    def remove(self, step: Step) -> None:
        """Refit without the units of a step."""
        b, w, *weighted = self.parts
        x = _solved(step.factor, b[:, step.rows])
        if weighted:
            assert step.c is not None and step.d is not None
            n, y = weighted
            j = _solved(step.factor, n[:, step.rows])
            rest = j - step.c @ x
            n.baddbmm_(x.mT, rest, alpha=-1).baddbmm_(j.mT, x, alpha=-1)
            y.baddbmm_(x.mT, step.d, alpha=-1).baddbmm_(rest.mT, step.t, alpha=-1)
        b.baddbmm_(x.mT, x, alpha=-1)
        w.baddbmm_(x.mT, step.t, alpha=-1)
        self._place[step.units] = -1
        left = self._left
        if left.mean() <= COMPACT:
            keep = torch.from_numpy(left.repeat(self.taps).nonzero()[0]).to(b.device)
            parts = [x[:, keep.unsqueeze(1), keep] if i % 2 == 0 else x[:, keep] for i, x in enumerate(self.parts)]
            self._begin(parts, self.units[left])
            return
        for i, part in enumerate(self.parts):  # what rounding has left of them
            part[:, step.rows] = 0
            if i % 2 == 0:
                part[:, :, step.rows] = 0
        b[:, step.rows, step.rows] = 1

    def _blocks(self, matrix: Tensor) -> Tensor:
        """Diagonal blocks of the units, shape (Z, U, taps, taps)."""
        n = len(self.units)
        return matrix.view(len(matrix), n, self.taps, n, self.taps).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)


def stacked(consumers: Sequence[Features], dtype: torch.dtype) -> list[State]:
    """Where the elimination starts: consumers of the same form and the same units in one state.

    Raises:
        ImpreciseError: see :meth:`Features.state`.
    """
    alike: dict[tuple[object, ...], list[State]] = {}
    for consumer in consumers:
        state = consumer.state(dtype)
        key = state.taps, state.units.tobytes(), tuple(x.shape[1:] for x in state.parts), state.parts[0].device
        alike.setdefault(key, []).append(state)
    return [_joined(states) if len(states) > 1 else states[0] for states in alike.values()]


def _joined(states: Sequence[State]) -> State:
    parts = [torch.cat(part) for part in zip(*(state.parts for state in states), strict=True)]
    return State(parts, states[0].units, states[0].taps)


def _cholesky(matrix: Tensor, message: str) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed.any():
        raise ImpreciseError(message)
    return factor


def _solved(factor: Tensor, right: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(factor, right, upper=False)


def _batched(matrix: Tensor) -> Tensor:
    matrix = matrix.cpu() if matrix.device.type == "mps" else matrix  # MPS has no float64
    return matrix if matrix.dim() == 3 else matrix.unsqueeze(0)


def _gathered(matrix: Tensor, index: NDArray[np.int64], dtype: torch.dtype) -> Tensor:
    """Rows and columns ``index`` of a matrix, a copy."""
    if np.array_equal(index, np.arange(matrix.shape[-1])):
        return matrix.to(dtype, copy=True)
    at = torch.from_numpy(index).to(matrix.device)
    return matrix[:, at.unsqueeze(1), at].to(dtype)


def _spread(matrix: Tensor, at: Tensor, size: int, *, square: bool, diagonal: float) -> Tensor:
    """Rows (and columns) moved to ``at``; the others are 0, or ``diagonal`` on the diagonal."""
    wide = matrix.new_zeros(len(matrix), size, size if square else matrix.shape[2])
    if square:
        wide.diagonal(dim1=1, dim2=2).fill_(diagonal)
        wide[:, at.unsqueeze(1), at] = matrix
    else:
        wide[:, at] = matrix
    return wide
