r"""How strongly a refit is pulled towards the old weights, from the moments it is made of.

With few rows for the many features of a consumer, least squares fits their noise. Generalised cross-validation
estimates what a refit with ridge ε is worth on other rows without keeping any:

.. math:: \mathrm{GCV}(\epsilon) = \sum_o s_o
          \frac{\overline{(y_o - w_o^\top u)^2}}{\bigl(1 - (\mathrm{df}(\epsilon) + c)/n\bigr)^2}, \qquad
          \mathrm{df} = \operatorname{tr} P_{kk} (P_{kk} + \epsilon I)^{-1}

with n rows, c = 1 if a constant is fitted as well, and a share s_o for every output. Rows from positions of one sample
count as independent, which they are not; it chose well all the same (docs/benchmarks.md). Source: Golub, Heath and
Wahba 1979; its use here is ours.

With :math:`A = (P_{kk} + \epsilon I)^{-1}` the numerator is :math:`e - \operatorname{tr} M^\top A M - \epsilon
\operatorname{tr} M^\top A^2 M`, and df = d - ε tr A; so one Cholesky factorisation per candidate does, and it gives the
slope as well. From the middle candidate the slope says where to go on, mostly two of five are looked at. Of larger
consumers tr A is estimated by random vectors (Hutchinson 1990), the same ones for all candidates, and the arithmetic is
float32; the weights are then refined to float64 (Wilkinson 1963).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .least_squares import double, of_all, of_kept, solve

__all__ = ["RIDGES", "cross_validated"]

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Candidates, relative to the mean second moment of the kept features."""

FIRST = 2
"""The candidate to begin with; it is chosen most often."""

ALIKE = 1e-3
"""Scores that differ by less than this fraction are alike."""

EXACT = 144
"""Features up to which the trace is exact and the arithmetic float64."""

PROBES = 64
"""Random vectors for the trace beyond."""

RESIDUAL = 1e-8
"""What the equations for new weights may be off by, relative to their right-hand side."""


def cross_validated(
    second: Tensor,
    kept: Tensor,
    missing: Tensor,
    error: Tensor,
    rows: float,
    shares: Tensor | None = None,
    *,
    constant: bool = True,
) -> tuple[Tensor, float]:
    r"""What to add to the weights, :math:`(P_{kk} + \epsilon I)^{-1} M_k`, with ε by generalised cross-validation.

    Args:
        second: P, second moments of the inputs, shape (G, d, d).
        kept: features that stay, bool, shape (G, d).
        missing: M, moments of the inputs and of what the outputs lack, shape (G, d, O).
        error: mean squares of what they lack, shape (G, O).
        rows: n, how many rows the moments are means of.
        shares: s, shape (G, O); default: all 1.
        constant: whether a constant is fitted as well (the moments are centred).

    Returns:
        The step, shape (G, O, d), float64, 0 at removed features; and the ridge relative to the mean second moment of
        the kept features, one of :data:`RIDGES`: the smallest if nothing is lacking, the largest of those that score
        alike (all do if there are too few rows to tell). Where the score has several minima, the next one downhill.

    Example:
        25 rows of 20 features: targets they explain need no pull, targets that are noise a strong one.

        >>> generator = torch.Generator().manual_seed(0)
        >>> u, w, noise = (torch.randn(n, generator=generator).double() for n in ((25, 20), (20, 50), (25, 50)))
        >>> kept, p = torch.ones(1, 20, dtype=torch.bool), u.T @ u / 25
        >>> for y in (u @ w, noise):
        ...     step, ridge = cross_validated(p[None], kept, (u.T @ y / 25)[None], y.square().mean(0)[None], 25)
        ...     ridge, bool((step[0] - w.T).abs().max() < 0.1)
        (0.001, True)
        (10.0, False)
    """
    problem = _Problem.of(second, kept, missing, error, shares, (rows, constant))
    if not bool((problem.lacking > 0).any()):
        return problem.weights(problem.candidate(RIDGES[0])), RIDGES[0]
    best = problem.candidate(RIDGES[FIRST])
    down = best.rises
    for ridge in reversed(RIDGES[:FIRST]) if down else RIDGES[FIRST + 1 :]:
        if best.rises != down:  # the minimum lies between the last two
            break
        other = problem.candidate(ridge)
        if other.score * (1 + ALIKE) >= best.score if down else other.score > best.score * (1 + ALIKE):
            break
        best = other
    return problem.weights(best), best.ridge


@dataclass(frozen=True, eq=False)
class _Candidate:
    """A ridge, its score, the slope of that over log ε, the factor, and A M; without a score, neither is there."""

    ridge: float
    score: float
    slope: float
    factor: Tensor
    step: Tensor | None

    @property
    def rises(self) -> bool:
        """Whether larger ridges are worse; not if they are alike, or if there is no score."""
        return self.slope > ALIKE * self.score


@dataclass(frozen=True, eq=False)
class _Problem:
    r"""The moments of the kept features, divided by the mean square of a feature.

    Attributes:
        second: P, shape (G, d, d).
        missing: M, shape (G, d, O).
        size: what they were divided by, shape (G,).
        unit: what M was divided by besides.
        right: M and the vectors that estimate a trace, in the precision of the work, shape (G, d, O + v).
        lacking: :math:`\sum_o s_o e_o`, shape (G,), in the same units.
        shares: of each output, shape (G, 1, O).
        kept: features that stay, shape (G, d).
        rows: n, and whether a constant takes one of them.
    """

    second: Tensor
    missing: Tensor
    size: Tensor
    unit: float
    right: Tensor
    lacking: Tensor
    shares: Tensor
    kept: Tensor
    rows: tuple[float, bool]

    @classmethod
    def of(
        cls,
        second: Tensor,
        kept: Tensor,
        missing: Tensor,
        error: Tensor,
        shares: Tensor | None,
        rows: tuple[float, bool],
    ) -> _Problem:
        p, m, e = double(second), double(missing), double(error)
        kept = kept.to(p.device)
        share = torch.ones_like(e) if shares is None else shares.to(e)
        size = (p.diagonal(dim1=1, dim2=2) * kept).sum(1) / kept.sum(1).clamp_min(1)
        size = torch.where(size > 0, size, 1.0)
        scale = 1 / size.view(-1, 1, 1)
        p, m = of_kept(p, m, kept)
        p, m = p * scale, m * scale
        unit = float(m.abs().amax()) or 1.0
        m /= unit
        d = p.shape[1]
        dtype = torch.float64 if d <= EXACT else torch.float32
        if d <= EXACT:
            probes = torch.eye(d, dtype=dtype, device=p.device)
        else:
            generator = torch.Generator().manual_seed(d)
            signs = torch.randint(0, 2, (d, PROBES), generator=generator, device="cpu") * 2 - 1
            probes = signs.to(p.device, dtype) * PROBES**-0.5
        right = torch.cat([m.to(dtype), probes.expand(len(p), -1, -1)], 2)
        lacking = (e * share).sum(1) / (size * unit**2)
        return cls(p, m, size, unit, right, lacking, share.unsqueeze(1), kept, rows)

    def candidate(self, ridge: float) -> _Candidate:
        """Score and slope of a ridge; infinite if there are too few rows for it, or it does not hold P up."""
        shifted = self.second.to(self.right.dtype, copy=True)
        shifted.diagonal(dim1=1, dim2=2).add_(ridge)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if failed.any():
            return _Candidate(ridge, math.inf, 0.0, factor, None)
        o, (rows, constant) = self.missing.shape[2], self.rows
        half = torch.linalg.solve_triangular(factor, self.right, upper=False)
        whole = torch.linalg.solve_triangular(factor.mT, half, upper=True)
        step = whole[:, :, :o].contiguous()
        more = torch.linalg.solve_triangular(factor, step, upper=False)
        known, twice, thrice = (_energy(x, self.shares) for x in (half[:, :, :o], step, more))
        trace, square = (_energy(x[:, :, o:]) for x in (half, whole))
        left = (self.lacking - known - ridge * twice).clamp_min(0)
        free = 1 - (self.second.shape[1] - ridge * trace + constant) / rows
        counts = self.lacking > 0
        if bool((free[counts] <= 0).any()):
            return _Candidate(ridge, math.inf, 0.0, factor, step)
        left, free, size = left[counts], free[counts], self.size[counts]
        grows = 2 * ridge**2 * thrice[counts] / free**2
        shrinks = 2 * left * ridge * (trace - ridge * square)[counts] / (rows * free**3)
        return _Candidate(
            ridge, float((size * left / free**2).sum()), float((size * (grows - shrinks)).sum()), factor, step
        )

    def weights(self, best: _Candidate) -> Tensor:
        """A M in float64, all features, shape (G, O, d)."""
        found = None if best.step is None else self._refined(best.step.double(), best)
        if found is None:
            found = solve(self.second, self.missing, best.ridge, self.kept.sum(1))
        return of_all(found * self.unit, self.kept)

    def _refined(self, step: Tensor, best: _Candidate) -> Tensor | None:
        """The step, corrected by the same factor until it solves the equations in float64; None if it never does."""
        if self.right.dtype == torch.float64:
            return step
        size = float(self.missing.square().sum())
        for _ in range(4):
            off = torch.baddbmm(self.missing - best.ridge * step, self.second, step, alpha=-1)
            if float(off.square().sum()) <= RESIDUAL**2 * size:
                return step
            step = step + torch.cholesky_solve(off.to(best.factor), best.factor)
        return None


def _energy(x: Tensor, shares: Tensor | None = None) -> Tensor:
    """Sum of squares per conv group, over the outputs as their shares say."""
    columns = x.square().sum(1, keepdim=True).double()
    return (columns if shares is None else columns * shares).sum((1, 2))
