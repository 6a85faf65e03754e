r"""Least-squares refit of a consumer when some of its input features go.

A consumer with weight W turns the unfolded input u into Wᵀu. Without the features r it is left with :math:`W_k^\top
u_k`; what the kept features know of the removed ones is made up for by new weights W'. Only second moments are
needed, so one matrix per consumer serves every choice of r. Layout as in :mod:`.moments`: G conv groups, d
features, O outputs each.

Source: least-squares reconstruction (He et al. 2017, arXiv 1707.06168; ThiNet, arXiv 1707.06342); the form in which
the ridge pulls towards the old weights, from moments, for any criterion: ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .moments import Moments

__all__ = ["Shortfall", "of_all", "of_kept", "output_energy", "refit", "residual_energy", "solve"]

SINGULAR = 1e-12
"""Without a ridge, eigenvalues below this fraction of the largest count as zero."""


def refit(second: Tensor, weight: Tensor, kept: Tensor, ridge: float, missing: Tensor | None = None) -> Tensor:
    r"""Weights of the kept features that best restore the outputs.

    .. math:: W'_k = W_k + (P_{kk} + \epsilon I)^{-1} M_k, \qquad
              \epsilon = \mathrm{ridge} \cdot \mathrm{mean}\,\mathrm{diag}\,P_{kk}

    minimises :math:`\overline{|y - W'^\top u_k|^2} + \epsilon |W'_k - W_k|^2`, with M the moments of the inputs and of
    what :math:`W_k` lacks, :math:`y - W_k^\top u_k`. By default the targets y are the consumer's own outputs and
    :math:`M_k = P_{kr} W_r`: the error on the data is then never larger than that of :math:`W_k`.

    Args:
        second: P, second moments of the inputs (centred if a bias follows the means), shape (G, d, d).
        weight: W per conv group, shape (G, O, d).
        kept: features that stay, bool, shape (G, d).
        ridge: fraction ≥ 0; 0 solves by the pseudoinverse.
        missing: M, shape (G, d, O), as :meth:`Shortfall.moments` gives them; default: own outputs.

    Returns:
        shape (G, O, d), 0 at removed features; float64, but ``weight`` itself if own outputs lose no feature.

    Raises:
        ValueError: for a negative ridge or shapes that do not fit.

    Example:
        >>> u = torch.randn(50, 2, dtype=torch.float64)
        >>> u = torch.cat([u, u.sum(1, keepdim=True)], 1)  # the third feature is the sum of the others
        >>> kept = torch.tensor([[True, True, False]])
        >>> refit((u.T @ u / 50)[None], torch.tensor([[[1.0, 2.0, 3.0]]]), kept, 0.0).round(decimals=6)
        tensor([[[4., 5., 0.]]], dtype=torch.float64)
    """
    g, o, d = weight.shape
    if second.shape != (g, d, d) or kept.shape != (g, d) or (missing is not None and missing.shape != (g, d, o)):
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} needs moments of shape {(g, d, d)} and kept of shape {(g, d)}, "
            f"not {tuple(second.shape)} and {tuple(kept.shape)}"
            + ("" if missing is None else f"; and missing of shape {(g, d, o)}, not {tuple(missing.shape)}")
        )
    if not ridge >= 0:
        raise ValueError(f"ridge={ridge!r} must be a fraction, at least 0")
    if missing is None and bool(kept.all()):
        return weight
    p_all, w_all = double(second), double(weight)
    kept = kept.to(p_all.device)
    w_all = w_all.to(p_all.device)
    if missing is None:
        lacking = p_all @ (w_all * ~kept.unsqueeze(1)).mT
    else:
        lacking = double(missing).to(p_all)
    step = solve(*of_kept(p_all, lacking, kept), ridge, kept.sum(1))
    return w_all * kept.unsqueeze(1) + of_all(step, kept)


def of_kept(gram: Tensor, right: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Equations of the features that stay; of several conv groups, which keep different ones, those that go are 0.

    Args:
        gram: shape (G, d, d).
        right: shape (G, d, O).
        kept: bool, shape (G, d).
    """
    if len(kept) == 1:
        at = kept[0].nonzero().squeeze(1)
        return gram[:, at.unsqueeze(1), at], right[:, at]
    return gram * kept.unsqueeze(2) * kept.unsqueeze(1), right * kept.unsqueeze(2)


def of_all(solution: Tensor, kept: Tensor) -> Tensor:
    """A solution of :func:`of_kept` as a weight of all features, 0 at those that go, shape (G, O, d)."""
    if len(kept) > 1:
        return solution.mT * kept.unsqueeze(1)
    whole = solution.new_zeros(1, solution.shape[2], kept.shape[1])
    whole[:, :, kept[0]] = solution.mT
    return whole


@dataclass
class Shortfall:
    r"""Streaming moments of inputs ũ and of e = y - W ũ, what a weight W lacks: exactly 0 where nothing changed.

    Attributes:
        inputs: moments of ũ, rows (R, G, d).
        cross: :math:`\sum (ũ-s) e^\top` with the shift s of ``inputs``, shape (G, d, O).
        lacking: :math:`\sum e`, shape (G, O).
        squares: :math:`\sum e^2`, shape (G, O).
        outputs: :math:`\sum y` and :math:`\sum y^2`, shape (2, G, O).

    Example:
        >>> u, w = torch.randn(50, 1, 3), torch.randn(1, 2, 3)
        >>> y = torch.einsum("rgd,god->rgo", u, w)
        >>> same, half = Shortfall(), Shortfall()
        >>> same.update(u, y, w), half.update(u, y, 0.5 * w)
        (None, None)
        >>> float(same.moments(True)[3].sum()), bool((half.moments(True)[3] > 0).all())
        (0.0, True)
    """

    inputs: Moments = field(default_factory=Moments)
    cross: Tensor | None = None
    lacking: Tensor | None = None
    squares: Tensor | None = None
    outputs: Tensor | None = None

    def update(self, u: Tensor, y: Tensor, plain: Tensor) -> None:
        """Add rows of inputs (R, G, d) and wanted outputs (R, G, O); ``plain`` is W, shape (G, O, d)."""
        if not len(u):
            return
        self.inputs.update(u, torch.zeros(len(u), dtype=torch.int64, device=u.device))
        assert self.inputs.shift is not None
        wide = self.inputs.shift.dtype
        e = y.to(u) - torch.einsum("rgd,god->rgo", u, plain.to(u))
        centred, y = u - self.inputs.shift.to(u), y.to(wide)
        found = (
            torch.einsum("rgd,rgo->gdo", centred, e).to(wide),
            e.to(wide).sum(0),
            e.to(wide).square().sum(0),
            torch.stack([y.sum(0), y.square().sum(0)]),
        )
        old = self.cross, self.lacking, self.squares, self.outputs
        self.cross, self.lacking, self.squares, self.outputs = (
            new if known is None else known + new for known, new in zip(old, found, strict=True)
        )

    def moments(self, centred: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """P, mean of ũ, moments of ũ and e (G, d, O), mean squares of e and y, mean of e (G, O)."""
        assert self.cross is not None and self.lacking is not None and self.inputs.shift is not None
        assert self.squares is not None and self.outputs is not None
        n, mean, second = self.inputs.rows, self.inputs.mean(), self.inputs.total()
        lacking, cross, error = self.lacking / n, self.cross / n, self.squares / n
        output, energy = self.outputs / n
        if centred:
            cross = cross - (mean - self.inputs.shift).unsqueeze(2) * lacking.unsqueeze(1)
            error, energy = error - lacking.square(), energy - output.square()
        else:
            cross = cross + self.inputs.shift.unsqueeze(2) * lacking.unsqueeze(1)
            second = second + mean.unsqueeze(2) * mean.unsqueeze(1)
        return second, mean, cross, error.clamp(min=0), energy.clamp(min=0), lacking


def output_energy(second: Tensor, weight: Tensor) -> Tensor:
    r"""Mean square :math:`\overline{(w_o^\top u)^2}` of every output.

    Args:
        second: P, shape (G, d, d).
        weight: W, or the difference of two, shape (G, O, d).

    Returns:
        shape (G, O), float64, not negative.

    Example:
        >>> output_energy(torch.eye(2)[None], torch.tensor([[[3.0, 4.0]]])).tolist()
        [[25.0]]
    """
    p = double(second)
    w = double(weight).to(p.device)
    return ((w @ p) * w).sum(2).clamp(min=0)


def residual_energy(second: Tensor, weight: Tensor, cross: Tensor, target: Tensor) -> Tensor:
    r"""Mean square :math:`\overline{(y_o - w_o^\top u)^2}` of what every output misses of its target.

    Args:
        second: P, shape (G, d, d).
        weight: W, shape (G, O, d).
        cross: C, moments of inputs and targets, shape (G, d, O).
        target: :math:`\overline{y_o^2}`, shape (G, O).

    Returns:
        shape (G, O), float64, not negative.

    Example:
        >>> one = torch.ones(1, 1, 1)
        >>> residual_energy(one, 0.5 * one, one, torch.ones(1, 1)).tolist()  # y = u, of unit energy
        [[0.25]]
    """
    p = double(second)
    w, c, y = (double(t).to(p.device) for t in (weight, cross, target))
    return (y - 2 * (w * c.mT).sum(2) + ((w @ p) * w).sum(2)).clamp(min=0)


def solve(gram: Tensor, right: Tensor, ridge: float, count: Tensor | None = None) -> Tensor:
    """(gram + εI)⁻¹ right for positive semidefinite matrices that rounding may have made slightly indefinite.

    Args:
        gram: shape (G, d, d).
        right: shape (G, d, O).
        ridge: ε relative to the mean of the diagonal.
        count: features of every matrix, if there are others that are zero; shape (G,).
    """
    if not gram.numel():
        return torch.zeros_like(right)
    total = gram.diagonal(dim1=1, dim2=2).sum(1)
    epsilon = (ridge * total / (gram.shape[1] if count is None else count.clamp_min(1))).view(-1, 1, 1)
    varies = total > 0  # else nothing is to be learnt
    solved, failed = torch.zeros_like(right), varies
    if ridge > 0:
        shifted = gram.clone()
        shifted.diagonal(dim1=1, dim2=2).add_(torch.where(varies.view(-1, 1, 1), epsilon, 1.0).squeeze(2))
        factor, info = torch.linalg.cholesky_ex(shifted)
        failed = varies & (info != 0)
        solved = torch.where(varies.view(-1, 1, 1), torch.cholesky_solve(right, factor), 0.0)
    if failed.any():
        solved[failed] = _by_eigenvalues(gram[failed], right[failed], epsilon[failed], ridge)
    return solved


def _by_eigenvalues(gram: Tensor, right: Tensor, epsilon: Tensor, ridge: float) -> Tensor:
    values, vectors = eigen(gram)
    values = values.clamp(min=0).unsqueeze(2)
    inverse = (values + epsilon).reciprocal()
    if ridge == 0:
        inverse = torch.where(values > SINGULAR * values[:, -1:], inverse, 0.0)
    return vectors @ (inverse * (vectors.mT @ right))


def eigen(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of symmetric matrices, shape (..., d, d), of any scale.

    LAPACK's iteration does not converge on matrices whose entries are all tiny (1e-17), as of channels that are dead on
    the data; so the largest diagonal entry is made 1.
    """
    scale = gram.diagonal(dim1=-2, dim2=-1).amax(-1).clamp_min(torch.finfo(gram.dtype).tiny)
    values, vectors = torch.linalg.eigh(gram / scale[..., None, None])
    return values * scale.unsqueeze(-1), vectors


def double(x: Tensor) -> Tensor:
    """In float64, on the CPU where the device has none."""
    return (x.cpu() if x.device.type == "mps" else x).double()  # MPS has no float64
