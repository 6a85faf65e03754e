r"""Fusible residual convolution and which layers to drop (ResConv, arXiv 2011.14356): tensors and arrays only.

The block is :math:`y = s \cdot BN(W * x) + a \cdot x`, s the layer scaling factor and a the information control.
A convolution of stride 1 that keeps shape and channels can absorb the shortcut into the centre of its kernel.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor

__all__ = ["cheapest_removal", "fused_kernel", "layer_loss", "scaled_batchnorm", "soft_threshold"]


def fused_kernel(
    weight: Tensor,
    bias: Tensor | None,
    s: float,
    a: float,
    *,
    groups: int = 1,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor]:
    r"""Kernel and bias of the one convolution that computes :math:`s \cdot BN(W * x + b) + a \cdot x`.

    With :math:`g_o = \gamma_o / \sqrt{\sigma_o^2 + \epsilon}` (1 without batch norm)

    .. math:: W'_{oiuv} = s g_o W_{oiuv} + a \cdot 1[i = o \bmod C/groups] \cdot 1[(u, v) = \text{centre}], \quad
              b'_o = s (\beta_o - g_o \mu_o) + s g_o b_o

    Exact for any padding mode: at stride 1 and with :math:`2p = d (k - 1)` the centre never reads the padding.

    Args:
        weight: W, shape (C, C / groups, k, ...), all k odd.
        bias: b, shape (C,), or ``None``.
        s: layer scaling factor.
        a: information control.
        groups: of the convolution.
        mean: μ, shape (C,); ``None`` together with ``var``: no batch norm.
        var: σ², shape (C,).
        gamma: γ, shape (C,); ``None``: 1.
        beta: β, shape (C,); ``None``: 0.
        eps: ε.

    Returns:
        ``(W', b')`` in the dtype of ``weight``; computed in float64.

    Raises:
        ValueError: if the kernel has no centre or does not keep the number of channels.

    Example:
        >>> kernel, bias = fused_kernel(torch.zeros(2, 2, 3, 3), None, 1.0, 0.5)
        >>> x = torch.randn(1, 2, 4, 4)
        >>> torch.equal(torch.conv2d(x, kernel, bias, padding=1), 0.5 * x)
        True

    Source: ours; so is the placement of the shortcut behind the batch norm.
    """
    channels, per_group, *size = weight.shape
    if channels != per_group * groups or any(k % 2 == 0 for k in size):
        raise ValueError(
            f"a kernel of shape {tuple(weight.shape)} with groups={groups} cannot hold a shortcut: it needs as many "
            "inputs as outputs and odd sizes"
        )
    w = weight.detach().double()
    gain, shift = torch.ones_like(w[:, 0].flatten(1)[:, 0]), torch.zeros_like(w[:, 0].flatten(1)[:, 0])
    if mean is not None and var is not None:
        gain = (var.detach().double() + eps).rsqrt()
        gain = gain if gamma is None else gain * gamma.detach().double()
        shift = -gain * mean.detach().double()
        shift = shift if beta is None else shift + beta.detach().double()
    if bias is not None:
        shift = shift + gain * bias.detach().double()
    kernel = s * gain.view(-1, *[1] * (w.dim() - 1)) * w
    rows = torch.arange(channels, device=w.device)
    centre = [torch.full_like(rows, k // 2) for k in size]
    kernel[(rows, rows % per_group, *centre)] += a
    return kernel.to(weight.dtype), (s * shift).to(weight.dtype)


def scaled_batchnorm(
    mean: Tensor, var: Tensor, gamma: Tensor | None, eps: float, ratio: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    r"""Statistics of a batch norm whose input is divided by ``ratio``, so that its output stays the same.

    .. math:: \mu' = \mu / r, \qquad \sigma'^2 = (\sigma^2 + \epsilon) / r^2 - \epsilon, \qquad \gamma' = \gamma

    so that training goes on unharmed: batch statistics would follow the input, a changed γ would not. Channels for
    which that variance would be negative keep σ² and get :math:`\gamma' = r \gamma`.

    Args:
        mean: μ, shape (C,).
        var: σ², shape (C,).
        gamma: γ, shape (C,), or ``None``.
        eps: ε.
        ratio: r > 0, shape (C,).

    Returns:
        ``(μ', σ'², γ')`` in the dtypes given.

    Raises:
        ValueError: if γ is ``None`` and a variance would be negative.

    Source: ours.
    """
    r = ratio.double()
    scaled = (var.double() + eps) / r.square() - eps
    negative = scaled < 0
    if gamma is None and bool(negative.any()):
        raise ValueError("the variance is too small to be scaled, and there is no weight to take the factor")
    changed = None if gamma is None else torch.where(negative, gamma.double() * r, gamma.double()).to(gamma.dtype)
    return (mean.double() / r).to(mean.dtype), torch.where(negative, var.double(), scaled).to(var.dtype), changed


def soft_threshold(value: Tensor, amount: float) -> Tensor:
    r"""Proximal map of :math:`amount \cdot |v|`: :math:`sign(v) \max(|v| - amount, 0)`.

    Args:
        value: any shape.
        amount: ≥ 0; learning rate times λ for a proximal gradient step.

    Example:
        >>> soft_threshold(torch.tensor([1.0, -0.25, 0.1]), 0.25).tolist()
        [0.75, -0.0, 0.0]
    """
    return value.sign() * (value.abs() - amount).clamp(min=0)


def layer_loss(s: float, a: float, branch: float, stream: float) -> float:
    r"""What is lost with a layer: how much its convolution adds, relative to what the shortcut passes on.

    .. math:: \frac{|s| \cdot rms(\gamma)}{a \cdot rms(x)}

    Unchanged by (s, γ, β) → (s / t, tγ, tβ). With a = 0 the layer would become the identity, so 1 stands for a.

    Args:
        s: layer scaling factor.
        a: information control, ≥ 0.
        branch: rms(γ), or the root mean square of what the convolution gives where there is no batch norm.
        stream: rms(x) of the input.

    Raises:
        ValueError: if ``a`` is negative or ``stream`` not positive.

    Example:
        >>> layer_loss(0.5, 1.0, 2.0, 4.0) == layer_loss(0.25, 1.0, 4.0, 4.0)
        True

    Source: ours.
    """
    if not (a >= 0 and stream > 0):  # also NaN
        raise ValueError(f"a={a} must be >= 0 and rms(x)={stream} > 0")
    return abs(s) * branch / ((a or 1.0) * stream)


def cheapest_removal(
    losses: ArrayLike, savings: Mapping[str, ArrayLike], needed: Mapping[str, float]
) -> NDArray[np.int64]:
    r"""Layers whose removal saves enough at the least total loss: a knapsack, solved exactly.

    .. math:: \min_{z \in \{0, 1\}^L} \sum_l loss_l z_l \quad \text{s.t.} \quad \sum_l saving_{fl} z_l \ge needed_f

    Args:
        losses: ≥ 0, shape (L,).
        savings: per cost field what the removal of each layer saves, shape (L,).
        needed: per cost field what must be saved at least.

    Returns:
        Positions of the layers to remove, ascending; empty if nothing need be saved.

    Raises:
        ValueError: if all layers together do not save enough, or a loss is negative or not finite.

    Example:
        >>> cheapest_removal([1.0, 5.0, 1.5], {"macs": [10, 30, 20]}, {"macs": 30}).tolist()
        [0, 2]

    Source: ours; scipy's HiGHS does the work.
    """
    loss = np.asarray(losses, np.float64)
    if not (np.isfinite(loss).all() and (loss >= 0).all()):
        raise ValueError("losses must be finite and not negative")
    rows = {f: np.asarray(savings[f], np.float64) for f, least in needed.items() if least > 0}
    if not rows:
        return np.zeros(0, np.int64)
    for field, row in rows.items():
        if row.sum() < needed[field]:
            raise ValueError(
                f"all {len(loss)} layers together save {row.sum():g} {field}, needed are {needed[field]:g}"
            )
    least = np.array([needed[f] for f in rows])
    saved = np.stack(list(rows.values()))
    order = np.argsort(loss, kind="stable")
    enough = np.asarray((saved[:, order].cumsum(1) >= least[:, None]).all(0))
    enough[-1] = True  # checked above, but in another order of summation
    upper = float(loss[order][: int(enough.argmax()) + 1].sum())  # of the cheapest layers, as many as needed
    unit = float(loss[loss <= upper].max()) or 1.0
    tie = 1e-3 * saved.sum(0) / saved.sum()  # of equal losses the set that saves least
    objective = np.where(loss <= upper, 1e6 * loss / unit, 0.0) + tie  # HiGHS takes sums 1e-6 apart for equal
    constraints = [LinearConstraint(saved / least[:, None], lb=np.ones(len(rows)))]
    while True:
        result = milp(
            objective,
            integrality=np.ones(len(loss)),
            bounds=Bounds(0, (loss <= upper).astype(np.float64)),
            constraints=constraints,
            options={"mip_rel_gap": 0.0},
        )
        if result.x is None:  # rounding has the last word: the cheapest layers will do
            return np.sort(order[: int(enough.argmax()) + 1])
        chosen = np.round(result.x) > 0
        if (saved[:, chosen].sum(1) >= least).all():
            return np.flatnonzero(chosen)
        # right within the solver's tolerance, short when summed exactly: one of the others is needed
        constraints.append(LinearConstraint((~chosen)[None].astype(np.float64), lb=np.ones(1)))
