r"""How strongly a refit is pulled towards the old weights, from the moments it is made of.

With few rows for the many features of a reader, least squares fits their noise. Generalised cross-validation estimates
what a refit with ridge ε is worth on other rows without keeping any:

.. math:: \mathrm{GCV}(\epsilon) = \sum_o s_o
          \frac{\overline{(y_o - w_o^\top u)^2}}{\bigl(1 - (\mathrm{df}(\epsilon) + 1)/n\bigr)^2}, \qquad
          \mathrm{df} = \operatorname{tr} P_{kk} (P_{kk} + \epsilon I)^{-1}

with n rows and a share s_o for every output. Rows from positions of one sample count as independent, which they are
not; it chose well all the same (docs/benchmarks.md). Source: Golub, Heath and Wahba 1979; its use here is ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .refit import double

__all__ = ["RIDGES", "choose_ridge"]

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Candidates, relative to the mean second moment of the kept features."""


def choose_ridge(
    second: Tensor, kept: Tensor, missing: Tensor, error: Tensor, rows: float, shares: Tensor | None = None
) -> float:
    r"""The candidate of :data:`RIDGES` with the least generalised cross-validation.

    Args:
        second: P, second moments of the inputs, shape (G, d, d).
        kept: features that stay, bool, shape (G, d).
        missing: moments of the inputs and of what the outputs lack, shape (G, d, O).
        error: mean squares of what they lack, shape (G, O).
        rows: n, how many rows the moments are means of.
        shares: s, shape (G, O); default: all 1.

    Returns:
        The ridge; the smallest if nothing is lacking.

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
    if kept.shape[0] == 1:
        p, m, kept = p[:, kept[0]][:, :, kept[0]], m[:, kept[0]], kept[:, kept[0]]
    size = p.diagonal(dim1=1, dim2=2).sum(1) / kept.sum(1).clamp_min(1)
    identity, best, least = torch.eye(p.shape[1]).to(p), RIDGES[0], float("inf")
    for ridge in RIDGES:
        epsilon = (ridge * size).view(-1, 1, 1)
        shift = torch.where(epsilon > 0, epsilon, 1.0)  # nothing varies there, nothing is learnt
        factor, failed = torch.linalg.cholesky_ex(p + shift * identity)
        if bool(failed.any()):
            continue
        inverse = torch.linalg.solve_triangular(factor, identity.expand_as(p), upper=False)
        half = inverse @ m
        step = inverse.mT @ half
        left = e.sum(1) - half.square().sum((1, 2)) - epsilon.flatten() * step.square().sum((1, 2))
        freedom = (kept.sum(1) - shift.flatten() * _trace(inverse, kept)) + 1
        free = 1 - freedom / rows
        score = float((left.clamp_min(0) / free.clamp_min(1e-6).square()).sum())
        if score < least:
            best, least = ridge, score
        elif bool((freedom < rows / 2).all()):  # it only rises from here
            break
    return best


def _trace(factor: Tensor, kept: Tensor) -> Tensor:
    """Trace of LᵀL over the kept features, shape (G,)."""
    return (factor.square().sum(1) * kept).sum(1)
