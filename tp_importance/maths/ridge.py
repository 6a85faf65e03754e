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
\operatorname{tr} M^\top A^2 M`, and df = d - ε tr A; so one Cholesky factorisation per candidate does. The candidates
are taken from the middle downhill, mostly three of five. Of large consumers tr A is estimated by random vectors
(Hutchinson 1990), the same ones for all candidates, and the arithmetic is float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .least_squares import double

__all__ = ["RIDGES", "choose_ridge"]

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Candidates, relative to the mean second moment of the kept features."""

FIRST = 1
"""The candidate to begin with, and the next larger one; they are chosen most often."""

ALIKE = 1e-3
"""Scores that differ by less than this fraction are alike."""

EXACT = 144
"""Features up to which the trace is exact and the arithmetic float64."""

PROBES = 64
"""Random vectors for the trace beyond."""


def choose_ridge(
    second: Tensor,
    kept: Tensor,
    missing: Tensor,
    error: Tensor,
    rows: float,
    shares: Tensor | None = None,
    *,
    constant: bool = True,
) -> float:
    r"""The candidate of :data:`RIDGES` with the least generalised cross-validation.

    Args:
        second: P, second moments of the inputs, shape (G, d, d).
        kept: features that stay, bool, shape (G, d).
        missing: moments of the inputs and of what the outputs lack, shape (G, d, O).
        error: mean squares of what they lack, shape (G, O).
        rows: n, how many rows the moments are means of.
        shares: s, shape (G, O); default: all 1.
        constant: whether a constant is fitted as well (the moments are centred).

    Returns:
        The ridge; the smallest if nothing is lacking, the largest of those that score alike (all do if there are too
        few rows to tell). It is a local minimum next to which both neighbours are no better.

    Example:
        25 rows of 20 features: targets they explain need no pull, targets that are noise a strong one.

        >>> generator = torch.Generator().manual_seed(0)
        >>> u, w, noise = (torch.randn(n, generator=generator).double() for n in ((25, 20), (20, 50), (25, 50)))
        >>> kept, p = torch.ones(1, 20, dtype=torch.bool), u.T @ u / 25
        >>> [choose_ridge(p[None], kept, (u.T @ y / 25)[None], y.square().mean(0)[None], 25) for y in (u @ w, noise)]
        [0.001, 10.0]
    """
    e = double(error)
    if shares is not None:
        e = e * shares.to(e)
    lost = e.sum(1)
    if not bool((lost > 0).any()):
        return RIDGES[0]
    problem = _Problem.of(second, kept, missing, shares, lost, (rows, constant))
    scores: dict[int, float] = {}

    def score(i: int) -> float:
        if i not in scores:
            scores[i] = problem.score(RIDGES[i])
        return scores[i]

    best, last = FIRST, len(RIDGES) - 1
    while best < last and score(best + 1) <= score(best) * (1 + ALIKE):
        best += 1
    if best == FIRST:
        while best > 0 and score(best - 1) * (1 + ALIKE) < score(best):
            best -= 1
    return RIDGES[best]


@dataclass(frozen=True, eq=False)
class _Problem:
    """The moments of the kept features, scaled so that their mean is 1, and what is lacking in all is 1.

    Attributes:
        second: P, shape (G, d, d).
        right: M and the vectors that estimate a trace, shape (G, d, O + v).
        outputs: O.
        weights: what is lacking in every conv group, shape (G,).
        rows: n, and whether a constant takes one of them.
    """

    second: Tensor
    right: Tensor
    outputs: int
    weights: Tensor
    rows: tuple[float, bool]

    @classmethod
    def of(
        cls,
        second: Tensor,
        kept: Tensor,
        missing: Tensor,
        shares: Tensor | None,
        lost: Tensor,
        rows: tuple[float, bool],
    ) -> _Problem:
        p, kept = double(second), kept.to(lost.device)
        m = double(missing) if shares is None else double(missing) * shares.to(p).sqrt().unsqueeze(1)
        count = kept.sum(1).clamp_min(1)
        size = (p.diagonal(dim1=1, dim2=2) * kept).sum(1) / count
        size = torch.where(size > 0, size, 1.0)
        if len(kept) == 1:
            at = kept[0].nonzero().squeeze(1)
            p, m = p[:, at.unsqueeze(1), at], m[:, at]
        else:
            p, m = p * kept.unsqueeze(2) * kept.unsqueeze(1), m * kept.unsqueeze(2)
        weights = torch.where(lost > 0, lost, 0.0)
        m = m / (size * torch.where(lost > 0, lost, 1.0)).sqrt().view(-1, 1, 1)
        d, dtype = p.shape[1], torch.float64 if p.shape[1] <= EXACT else torch.float32
        if d <= EXACT:
            probes = torch.eye(d, dtype=dtype, device=p.device)
        else:
            generator = torch.Generator().manual_seed(d)
            signs = torch.randint(0, 2, (d, PROBES), generator=generator, device="cpu") * 2 - 1
            probes = signs.to(p.device, dtype) * PROBES**-0.5
        right = torch.cat([m.to(dtype), probes.expand(len(p), -1, -1)], 2)
        return cls((p / size.view(-1, 1, 1)).to(dtype), right, m.shape[2], weights, rows)

    def score(self, ridge: float) -> float:
        """Generalised cross-validation of a candidate; infinite if there are too few rows for it."""
        shifted = self.second.clone()
        shifted.diagonal(dim1=1, dim2=2).add_(ridge)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if failed.any():
            return float("inf")
        half = torch.linalg.solve_triangular(factor, self.right, upper=False)
        known, probes = half[:, :, : self.outputs], half[:, :, self.outputs :]
        whole = torch.linalg.solve_triangular(factor.mT, known, upper=True)
        left = 1 - _energy(known) - ridge * _energy(whole)
        rows, constant = self.rows
        free = 1 - (self.second.shape[1] - ridge * _energy(probes) + constant) / rows
        score = torch.where(free > 0, left.clamp_min(0) / free.square(), torch.inf)
        return float(torch.where(self.weights > 0, score * self.weights, 0.0).sum())


def _energy(x: Tensor) -> Tensor:
    return x.square().sum((1, 2)).double()
