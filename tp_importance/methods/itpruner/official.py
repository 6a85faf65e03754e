r"""The published ITPruner procedure to the letter (arXiv 2108.08532, repository MAC-AutoML/ITPruner).

From relevances t (nHSIC row sums without the diagonal, scaled to sum 1) the public code solves

.. math:: \max_x \alpha^\top x \quad \text{s.t.} \quad F(x) \le B,\ 0 \le x_i \le 1, \quad \alpha_i = e^{-\beta t_i}

with SciPy's SLSQP from x = 1 (constraint gradient by finite differences, ftol 1e-6, exit status never read) and keeps
``round(x_i C_i)`` channels of group i. F is the authors' own count (:mod:`.official_networks`), not this package's cost
model; rounding to nearest may exceed the budget (VGG-16 at 100 M ends at 100.55 M). Use it to reproduce, not to prune.

What running it shows. α is mostly ≤ 1e-8. SLSQP starts from a unit Hessian and stops at the first x on the surface
F(x) = B once the objective moves by less than 1e-6. As long as every α is below about 1e-7 the importances therefore
never enter: each step is the shortest one to the linearised surface, :math:`x \leftarrow x - \frac{F(x) - B}
{\|\nabla F(x)\|^2} \nabla F(x)`, bent a little by the BFGS update. (It is not the projection of x = 1 onto the surface,
which is up to hundreds of channels away.) Random α up to 1e-8, or α = 0, give the very lists below; with α = 1e-3, all
equal, SLSQP optimises, and VGG-16 loses whole layers. The scale of α, free in the problem as stated, decides: pass α
as they are, and not the weights of :func:`tp_importance.methods.itpruner.hsic.importance_weights`, whose largest is 1.

:data:`PUBLISHED` has all 11 configurations of the repository. Equal importances give 9 of them exactly:

=================  ======  =====  ===========================================================================
network            budget  β      published list comes out
=================  ======  =====  ===========================================================================
VGG-16             100 M   231    with all importances equal
ResNet-20          20 M    246    with all importances equal
ResNet-56          60 M    500    with α ≳ 4e-7 for the last two blocks (t = .0244 against .0380 is ours)
MobileNetV1        50 M    243    with all importances equal
MobileNetV1        150 M   243    with all importances equal
MobileNetV1        285 M   233    with uneven α, led by the logits' 1e-6; the t is fitted by us, and fragile
MobileNetV2        150 M   2000   with all importances equal
MobileNetV2        220 M   2000   with all importances equal
ResNet-50          1800 M  2000   with all importances equal
ResNet-50          2000 M  2000   with all importances equal
ResNet-50          2300 M  2000   with all importances equal
=================  ======  =====  ===========================================================================

The features the authors measure, by their code: one batch of the test set (100 images, 1024 for VGG-16), the network in
*training* mode (``eval()`` is never called: batch statistics, and cutout for VGG-16), flattened to (n, C·H·W) at
:attr:`.OfficialNetwork.features`. The VGG-16 script leaves t unscaled if β = 1. Ours: the refusal of empty groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize

from tp_importance.methods.itpruner.official_networks import NETWORKS, OfficialNetwork

__all__ = [
    "PUBLISHED",
    "Published",
    "official_channels",
    "official_flops",
    "official_fractions",
    "official_importances",
]


def official_importances(relevance: ArrayLike, beta: float) -> NDArray[np.float64]:
    r"""Importances :math:`\alpha_i = e^{-\beta t_i}` as the code has them, without a shift or a scale.

    Args:
        relevance: t, shape (L,), in the order of :attr:`.OfficialNetwork.features`; sums to 1 in the published code.
        beta: the published values are in :data:`PUBLISHED`.

    Returns:
        shape (L,).

    Raises:
        ValueError: for values that are not finite, or an α that overflows.

    Example:
        >>> official_importances([0.5, 0.5], 0.0).tolist()
        [1.0, 1.0]
    """
    t = np.asarray(relevance, dtype=np.float64)
    if t.ndim != 1 or not np.isfinite(t).all():
        raise ValueError(f"relevance must be finite and 1-D, not {t.tolist()}; use hsic.relevance")
    if not np.isfinite(beta):
        raise ValueError(f"beta={beta} must be finite; the published values are 231 to 2000")
    with np.errstate(over="ignore"):
        alpha = np.exp(-beta * t)
    if not np.isfinite(alpha).all():
        raise ValueError(f"beta={beta} overflows with relevance down to {t.min()}; use a smaller one")
    return alpha


def official_flops(network: OfficialNetwork, channels: ArrayLike) -> float:
    """FLOPs of a channel list in the authors' count, as their constraint sees it (fixed costs left out).

    Args:
        network: from :data:`.NETWORKS`.
        channels: shape (L,), need not be integers.

    Raises:
        ValueError: for a wrong number of groups.

    Example:
        >>> from tp_importance.methods.itpruner.official_networks import vgg16
        >>> official_flops(vgg16(), PUBLISHED["vgg16-100m"].channels)
        100552887.0
    """
    c = np.asarray(channels, dtype=np.float64)
    if c.shape != (len(network.widths),):
        raise ValueError(f"{network.name} needs {len(network.widths)} channel counts, channels has shape {c.shape}")
    linear, quadratic = network.form()
    x = c / network.widths
    return float(linear @ x + x @ quadratic @ x)


def official_fractions(network: OfficialNetwork, importances: ArrayLike, budget: float) -> NDArray[np.float64]:
    """Kept fractions x at which SLSQP stops.

    Args:
        network: from :data:`.NETWORKS`.
        importances: α, shape (L,), unscaled; zeros give what all tiny importances give.
        budget: in the authors' FLOPs, for instance ``100e6``. A budget above the dense cost keeps everything.

    Returns:
        shape (L,), in [0, 1]. May be 0 for small budgets or large importances: there is no floor.

    Raises:
        ValueError: for importances of a wrong shape, negative or not finite, or a budget that is not positive.

    Example:
        >>> from tp_importance.methods.itpruner.official_networks import resnet_cifar
        >>> official_fractions(resnet_cifar(), [0.0] * 9, 20e6).round(3).tolist()
        [0.658, 0.663, 0.699, 0.701, 0.664, 0.701, 0.702, 0.665, 0.747]
    """
    alpha, size = np.asarray(importances, dtype=np.float64), len(network.widths)
    if alpha.shape != (size,):
        raise ValueError(f"{network.name} has {size} groups, importances has shape {alpha.shape}; give one per group")
    if not (np.isfinite(alpha).all() and (alpha >= 0).all()):
        raise ValueError(f"importances must be finite and >= 0, not {alpha.tolist()}; use official_importances")
    if not (np.isfinite(budget) and budget > 0):
        raise ValueError(f"budget={budget} must be a positive number of FLOPs, for instance 100e6")
    linear, quadratic = network.form()
    result = minimize(
        lambda x: -(alpha @ x),
        np.ones(size),
        jac=lambda x: -alpha,
        method="SLSQP",
        bounds=[(0.0, 1.0)] * size,
        constraints={"type": "ineq", "fun": lambda x: np.array([budget - linear @ x - x @ quadratic @ x])},
        options={"ftol": 1e-6, "maxiter": 100},
    )
    return np.asarray(result.x, dtype=np.float64)


def official_channels(network: OfficialNetwork, importances: ArrayLike, budget: float) -> list[int]:
    """Channel list of the published procedure: fractions times widths, rounded to nearest. May exceed the budget.

    Args:
        network: from :data:`.NETWORKS`.
        importances: see :func:`official_fractions`.
        budget: in the authors' FLOPs.

    Returns:
        L channel counts, each ≥ 1.

    Raises:
        ValueError: see :func:`official_fractions`; also where a group would lose all its channels, which the code
            does not notice.

    Example:
        >>> from tp_importance.methods.itpruner.official_networks import resnet_cifar
        >>> official_channels(resnet_cifar(20), [0.0] * 9, 20e6)
        [11, 11, 11, 22, 21, 22, 45, 43, 48]
    """
    channels = np.around(official_fractions(network, importances, budget) * network.widths).astype(int)
    empty = [name for name, c in zip(network.groups, channels, strict=True) if c < 1]
    if empty:
        dense = official_flops(network, network.widths)
        raise ValueError(
            f"{network.name} at budget={budget:g} of {dense:g} FLOPs leaves {', '.join(empty)} without channels (the "
            "published procedure has no floor); raise the budget, or the largest importance is no longer tiny "
            f"({np.max(importances):g}): raise beta"
        )
    return [int(c) for c in channels]


@dataclass(frozen=True)
class Published:
    """A configuration of the public repository.

    Attributes:
        name: key in :data:`PUBLISHED`.
        network: key in :data:`.NETWORKS`.
        budget: FLOPs in the authors' count.
        beta: β of the repository's script.
        channels: the published list.
        equal_importances: whether equal importances (all t = 1/L) give the list exactly.
        relevance: where they do not, a t summing to 1 that gives it with this β. Fitted by us, not the authors'.
    """

    name: str
    network: str
    budget: float
    beta: float
    channels: tuple[int, ...]
    equal_importances: bool = True
    relevance: tuple[float, ...] | None = None

    def importances(self) -> NDArray[np.float64]:
        """α that gives the published list: of equal relevances, or of the fitted ones."""
        size = len(self.channels)
        return official_importances(self.relevance or [1.0 / size] * size, self.beta)

    def reproduce(self) -> list[int]:
        """Run the procedure with :meth:`importances`.

        Example:
            >>> PUBLISHED["mobilenet_v2-150m"].reproduce()
            [29, 12, 16, 24, 43, 50, 98, 273]
        """
        return official_channels(NETWORKS[self.network](), self.importances(), self.budget)


_ALL = (
    Published("vgg16-100m", "vgg16", 100e6, 231, (44, 35, 71, 71, 145, 104, 145, 290, 205, 325, 432, 429, 469)),
    Published("resnet20-20m", "resnet20", 20e6, 246, (11, 11, 11, 22, 21, 22, 45, 43, 48)),
    Published(  # published per convolution: a stem of 16, then every block's width twice
        "resnet56-60m",
        "resnet56",
        60e6,
        500,
        (*[10] * 8, 11, 22, *[21] * 7, 22, 44, *[42] * 6, 64, 64),
        equal_importances=False,
        relevance=(*[(1 - 2 * 0.0244) / 25] * 25, 0.0244, 0.0244),
    ),
    Published(
        "mobilenet_v1-50m", "mobilenet_v1", 50e6, 243, (18, 31, 30, 38, 71, 76, 173, 52, 78, 78, 51, 178, 250, 522)
    ),
    Published(
        "mobilenet_v1-150m",
        "mobilenet_v1",
        150e6,
        243,
        (23, 42, 63, 67, 132, 134, 275, 194, 202, 202, 194, 277, 522, 687),
    ),
    Published(  # from the training script; the evaluation script has 733 for 734
        "mobilenet_v1-285m",
        "mobilenet_v1",
        285e6,
        233,
        (28, 52, 88, 90, 179, 182, 362, 311, 314, 314, 312, 367, 734, 1024),
        equal_importances=False,
        relevance=(
            *(0.0661, 0.0681, 0.0766, 0.0745, 0.0744, 0.0714, 0.0748),
            *(0.0751, 0.0742, 0.0740, 0.0731, 0.0709, 0.0683, 0.0585),
        ),
    ),
    Published("mobilenet_v2-150m", "mobilenet_v2", 150e6, 2000, (29, 12, 16, 24, 43, 50, 98, 273)),
    Published("mobilenet_v2-220m", "mobilenet_v2", 220e6, 2000, (31, 14, 20, 28, 54, 74, 130, 298)),
    Published(
        "resnet50-1800m",
        "resnet50",
        1800e6,
        2000,
        (
            *(48, 52, 52, 110, *[52] * 4, 98, 105, 142, *[105] * 6),
            *(197, 211, 48, *[211] * 10, 397, 420, 1264, *[419] * 3, 418),
        ),
    ),
    Published(
        "resnet50-2000m",
        "resnet50",
        2000e6,
        2000,
        (
            *(50, 53, 54, 125, *[54] * 4, 101, 108, 179, *[107] * 6),
            *(203, 216, 148, *[215] * 10, 407, 429, 1341, *[429] * 3, 428),
        ),
    ),
    Published(
        "resnet50-2300m",
        "resnet50",
        2300e6,
        2000,
        (
            *(52, 55, 55, 146, *[55] * 4, 105, 111, 232, *[111] * 6),
            *(211, 222, 290, *[222] * 10, 423, 442, 1453, *[442] * 4),
        ),
    ),
)

PUBLISHED: dict[str, Published] = {p.name: p for p in _ALL}
"""The 11 published configurations: VGG-16, ResNet-20 and -56 on CIFAR-10, the others on ImageNet."""
