r"""How strongly a refit is pulled towards the old weights, from the moments it is made of.

With few rows for the many features of a consumer, least squares fits their noise. Generalised cross-validation
estimates what a refit with ridge ε is worth on other rows without keeping any:

.. math:: \mathrm{GCV}(\epsilon) = \sum_o s_o
          \frac{\overline{(y_o - w_o^\top u)^2}}{\bigl(1 - (\mathrm{df}(\epsilon) + c)/n\bigr)^2}, \qquad
          \mathrm{df} = \operatorname{tr} P_{kk} (P_{kk} + \epsilon I)^{-1}

with n rows, c = 1 if a constant is fitted as well, and a share s_o for every output. Rows from positions of one sample
count as independent, which they are not; it chose well all the same (docs/benchmarks.md). Source: Golub, Heath and
Wahba 1979; its use here is ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .least_squares import double, eigen

__all__ = ["RIDGES", "choose_ridge"]

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Candidates, relative to the mean second moment of the kept features."""


ALIKE = 1e-3
"""Scores that differ by less than this fraction are alike."""


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
        few rows to tell).

    Example:
        25 rows of 20 features: targets they explain need no pull, targets that are noise a strong one.

        >>> generator = torch.Generator().manual_seed(0)
        >>> u, w, noise = (torch.randn(n, generator=generator).double() for n in ((25, 20), (20, 50), (25, 50)))
        >>> kept, p = torch.ones(1, 20, dtype=torch.bool), u.T @ u / 25
        >>> [choose_ridge(p[None], kept, (u.T @ y / 25)[None], y.square().mean(0)[None], 25) for y in (u @ w, noise)]
        [0.001, 10.0]
    """
    p, m = double(second), double(missing)
    kept = kept.to(p.device)
    p, m = p * kept.unsqueeze(2) * kept.unsqueeze(1), m * kept.unsqueeze(2)
    e = error.to(p)
    if shares is not None:
        e, m = e * shares.to(p), m * shares.to(p).sqrt().unsqueeze(1)
    if len(kept) == 1:
        p, m, kept = p[:, kept[0]][:, :, kept[0]], m[:, kept[0]], kept[:, kept[0]]
    size = p.diagonal(dim1=1, dim2=2).sum(1) / kept.sum(1).clamp_min(1)
    values, vectors = eigen(p)
    values, parts = values.clamp_min(0), (vectors.mT @ m).square().sum(2)
    scores = []
    for ridge in RIDGES:
        shrunk = values + (ridge * size).unsqueeze(1)
        inverse = torch.where(shrunk > 0, 1 / shrunk, 0.0)  # nothing varies there, nothing is learnt
        left = e.sum(1) - (parts * (2 - values * inverse) * inverse).sum(1)
        free = 1 - ((values * inverse).sum(1) + constant) / rows
        score = torch.where(free > 0, left.clamp_min(0) / free.square(), torch.inf)
        scores.append(float(torch.where(e.sum(1) > 0, score, 0.0).sum()))
    least = min(scores)
    if least == 0:  # nothing is lacking
        return RIDGES[0]
    return max(r for r, score in zip(RIDGES, scores, strict=True) if score <= least * (1 + ALIKE))
