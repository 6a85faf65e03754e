r"""Normalised HSIC between layers and the group relevance it gives (ITPruner, arXiv 2108.08532).

With features :math:`X_l \in R^{n \times d_l}` of one batch, :math:`K_l = X_l X_l^\top` and :math:`\tilde K = HKH`:

.. math:: \mathrm{nHSIC}_{ij} = \frac{\langle \tilde K_i, \tilde K_j\rangle}{\|\tilde K_i\|_F \|\tilde K_j\|_F}, \quad
          s_i = \sum_{j \ne i} \mathrm{nHSIC}_{ij}, \quad t_i = s_i / \textstyle\sum_k s_k, \quad
          \alpha_i = e^{-\beta (t_i - \min t)}

Linear nHSIC is linear CKA. The biased estimator saturates when d ≫ n: two *independent* feature sets then score
near 1. The unbiased one (Song et al. 2012; Nguyen et al. 2021 for mini-batches) does not, and may leave [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "Estimator",
    "HSICSums",
    "Kernel",
    "centre",
    "centred_gram",
    "cross_hsic",
    "gram",
    "importance_weights",
    "relevance",
]

Estimator = Literal["biased", "unbiased"]
Kernel = Literal["linear", "rbf"]


CHUNK, COLUMNS = 4096, 32
"""Features multiplied at a time, which stay in the cache, and columns of the lower triangle filled at a time: together
a third faster than one full product of all features."""

NOISE = 1e-12
"""Variation below this fraction of the energy is rounding of the features, not information."""


def gram(features: Tensor) -> Tensor:
    """Inner products of all pairs of samples, up to a shift of the features: the first sample is taken as origin.

    Centring removes the shift; with it, float32 is spared a cancellation. Features that are constant up to rounding
    give exact zeros.

    Args:
        features: shape (n, d), any real dtype.

    Returns:
        shape (n, n), float64; Gram matrices of several feature sets add up to that of all together.

    Example:
        >>> gram(torch.tensor([[1.0], [3.0]])).tolist()
        [[0.0, 0.0], [0.0, 4.0]]
    """
    n, origin = len(features), features[:1]
    total, shifted = features.new_zeros(n, n), features.new_empty(n, CHUNK)
    for part, start in zip(features.split(CHUNK, 1), origin.split(CHUNK, 1), strict=True):
        x = torch.sub(part, start, out=shifted[:, : part.shape[1]])
        for i in range(0, n, COLUMNS):
            total[i:, i : i + COLUMNS].addmm_(x[i:], x[i : i + COLUMNS].mT)
    total = total.double()
    total = total.tril() + total.tril(-1).mT
    noise = NOISE * torch.linalg.vector_norm(origin, dtype=torch.float64).square()
    return torch.where(total.diagonal().max() <= noise, 0.0, total)  # NaN stays


def centre(gram: Tensor, *, kernel: Kernel = "linear", estimator: Estimator = "biased") -> Tensor:
    r"""Centre a Gram matrix so that inner products of two of them are HSIC values.

    Biased: :math:`\tilde K = HKH`. Unbiased: the U-centred matrix of Székely and Rizzo, zero on the diagonal, whose
    inner products are :math:`n(n-3)` times the unbiased HSIC of Song et al.

    Args:
        gram: inner products, see :func:`gram`, shape (n, n).
        kernel: ``"linear"``, or ``"rbf"``: :math:`e^{-\|x - x'\|^2 / \sigma^2}` with the median of the squared
            distances of this batch for :math:`\sigma^2`.
        estimator: ``"biased"`` or ``"unbiased"``.

    Returns:
        shape (n, n).

    Raises:
        ValueError: for fewer than 2 samples (unbiased: 4).
    """
    n, least = len(gram), 2 if estimator == "biased" else 4
    if gram.shape != (n, n) or n < least:
        raise ValueError(f"the {estimator} estimator needs n >= {least} samples in a batch, not {tuple(gram.shape)}")
    if kernel == "rbf":
        square = gram.diagonal()
        distance = (square[:, None] + square[None, :] - 2 * gram).clamp(min=0)
        off = distance[~torch.eye(n, dtype=torch.bool, device=distance.device)]
        gram = torch.exp(-distance / off.median().clamp(min=1e-300))
    if estimator == "biased":
        rows = gram.mean(0)
        return gram - rows[:, None] - rows[None, :] + rows.mean()
    gram = gram.clone().fill_diagonal_(0.0)
    rows = gram.sum(0)
    gram = gram - (rows[:, None] + rows[None, :]) / (n - 2) + rows.sum() / ((n - 1) * (n - 2))
    return gram.fill_diagonal_(0.0)


def centred_gram(features: Tensor, *, kernel: Kernel = "linear", estimator: Estimator = "biased") -> Tensor:
    r"""Centred Gram matrix of one layer: :func:`gram`, then :func:`centre`.

    Args:
        features: shape (n, d), any real dtype.
        kernel: see :func:`centre`.
        estimator: see :func:`centre`.

    Returns:
        shape (n, n), float64.

    Example:
        >>> centred_gram(torch.tensor([[0.0], [2.0]])).tolist()
        [[1.0, -1.0], [-1.0, 1.0]]
    """
    return centre(gram(features), kernel=kernel, estimator=estimator)


def cross_hsic(features: Sequence[Tensor], *, kernel: Kernel = "linear", estimator: Estimator = "biased") -> Tensor:
    r"""Unnormalised HSIC of all pairs of layers.

    Linear and biased, the smaller of two forms is used: :math:`\langle \tilde K_i, \tilde K_j \rangle` from Gram
    matrices, or :math:`\|\tilde X_i^\top \tilde X_j\|_F^2` when all features together are fewer than the samples.

    Args:
        features: one matrix (n, d_l) per layer, the same n.
        kernel: see :func:`centred_gram`.
        estimator: see :func:`centred_gram`.

    Returns:
        shape (L, L), float64.

    Example:
        >>> x = torch.randn(50, 3)
        >>> gram, small = cross_hsic([x, x @ torch.randn(3, 40)]), cross_hsic([x])
        >>> torch.allclose(gram[0, 0], small[0, 0])
        True
    """
    n = len(features[0])
    if any(len(x) != n for x in features):
        raise ValueError(f"layers have different numbers of samples: {[len(x) for x in features]}")
    if kernel == "linear" and estimator == "biased" and n >= 2 and sum(x.shape[1] for x in features) < n:
        x = torch.cat([f.double() - f.double().mean(0) for f in features], 1)
        blocks = (x.mT @ x).square()
        owner = torch.repeat_interleave(torch.tensor([f.shape[1] for f in features], device="cpu")).to(x.device)
        rows = blocks.new_zeros(len(features), blocks.shape[1]).index_add_(0, owner, blocks)
        return rows.new_zeros(len(features), len(features)).index_add_(1, owner, rows)
    grams = torch.stack([centred_gram(x, kernel=kernel, estimator=estimator).flatten() for x in features])
    return grams @ grams.mT


@dataclass
class HSICSums:
    """HSIC of all pairs, averaged over batches; numerators and denominators separately, divided only at the end.

    Attributes:
        total: sum over batches of the HSIC values, each over n² (biased) or n(n − 3), shape (L, L).
        batches: number of batches.
    """

    total: Tensor | None = None
    batches: int = 0

    def update(self, grams: Sequence[Tensor], estimator: Estimator = "biased") -> HSICSums:
        """Add one batch's centred Gram matrices; returns self."""
        n = len(grams[0])
        flat = torch.stack([g.flatten() for g in grams])
        values = flat @ flat.mT / (n * n if estimator == "biased" else n * (n - 3))
        self.total = values if self.total is None else self.total + values
        self.batches += 1
        return self

    def normalised(self) -> NDArray[np.float64]:
        """nHSIC, shape (L, L); rows and columns of a constant layer are 0, whatever the scales of the layers."""
        if self.total is None:
            raise ValueError("no batch was seen")
        values = self.total.cpu().numpy()
        scale = np.sqrt(np.clip(values.diagonal(), 0.0, None))
        alive = scale > 0
        scale = np.where(alive, scale, 1.0)
        return np.where(alive[:, None] & alive[None, :], values / scale[:, None] / scale[None, :], 0.0)


def relevance(nhsic: NDArray[np.float64]) -> NDArray[np.float64]:
    """Relevance t of every layer, summing to 1; a layer that shares nothing has 0.

    A layer that alone varies has relevance 1.

    Args:
        nhsic: shape (L, L); zero on the diagonal where a layer is constant.

    Raises:
        ValueError: if all layers are constant, or none shares anything with another.

    Example:
        >>> relevance(np.array([[1.0, 0.5, 0.0], [0.5, 1.0, 0.5], [0.0, 0.5, 1.0]])).tolist()
        [0.25, 0.5, 0.25]
    """
    alive = nhsic.diagonal() > 0
    if not alive.any():
        raise ValueError("all layers are constant on the data")
    if alive.sum() == 1:
        return alive.astype(np.float64)
    s = nhsic.sum(1) - nhsic.diagonal()
    if not s.sum() > 0:
        raise ValueError("no layer shares information with another; take more samples, or the biased estimator")
    return s / s.sum()


def importance_weights(t: NDArray[np.float64], beta: float) -> NDArray[np.float64]:
    r"""Weights :math:`\hat\alpha_i = e^{-\beta (t_i - \min t)}` in (0, 1].

    Args:
        t: relevance, shape (L,).
        beta: any finite number; 0 gives equal weights, a negative one favours redundant layers.

    Raises:
        ValueError: for a β that is not finite, or so large that a weight underflows.

    Example:
        >>> importance_weights(np.array([0.25, 0.75]), 0.0).tolist()
        [1.0, 1.0]
    """
    if not np.isfinite(beta):
        raise ValueError(f"beta={beta} must be finite")
    exponent = -beta * (t - t.min())
    exponent -= exponent.max()  # the scale of the weights is free
    if exponent.min() < -600:
        raise ValueError(f"beta={beta} underflows: exponents reach {exponent.min():.0f}; use a smaller one")
    return np.exp(exponent)
