r"""Class scatter per channel and trace-ratio selection (CATRO, arXiv 2110.10921; ``space="channel"``).

Features of channel i on sample j: :math:`x_{j,i} \in R^p`. With class means :math:`\mu_{k,i}` over :math:`n_k` samples

.. math:: b_i = \sum_k n_k \|\mu_{k,i} - \mu_i\|^2, \qquad w_i = \sum_k \sum_{j \in k} \|x_{j,i} - \mu_{k,i}\|^2

which equal :math:`tr(X L_b X^\top)` and :math:`tr(X L_w X^\top)` for the graph weights :math:`A_w = 1/n_k` inside class
k and :math:`A_b = 11^\top/n - A_w`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ...maths.moments import NEGLIGIBLE

__all__ = ["ClassScatter", "TraceRatio", "select", "top_d_values"]


@dataclass
class ClassScatter:
    """Streaming class statistics of channels; merging is addition, any subset of classes can be taken later.

    Sums are float64 about a fixed ``shift`` (the first batch's mean), which a merge moves.

    Attributes:
        counts: samples per class, shape (K,).
        sums: class sums of x - shift, shape (K, C, p).
        squares: class sums of ‖x - shift‖², shape (K, C).
        shift: shape (C, p).

    Example:
        >>> x = torch.tensor([[0.0], [2.0], [4.0], [6.0]]).unsqueeze(2)
        >>> b, w = ClassScatter().update(x, torch.tensor([0, 0, 1, 1])).scatter()
        >>> b.tolist(), w.tolist()
        ([16.0], [4.0])
    """

    counts: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64, device="cpu"))
    sums: Tensor | None = None
    squares: Tensor | None = None
    shift: Tensor | None = None

    def update(self, x: Tensor, labels: Tensor) -> ClassScatter:
        """Add features ``x`` of shape (N, C, p) with ``labels`` of shape (N,); returns self."""
        if not len(x):
            return self
        accumulate = torch.float32 if x.device.type == "mps" else torch.float64
        if self.shift is None:
            self._start(x.mean(0).to(accumulate))
        assert self.shift is not None and self.sums is not None and self.squares is not None
        centred = x.to(accumulate) - self.shift
        self._grow(int(labels.max()) + 1)
        self.counts += torch.bincount(labels, minlength=len(self.counts)).to(self.counts)
        self.sums.index_add_(0, labels, centred)
        self.squares.index_add_(0, labels, centred.square().sum(2))
        return self

    def merge(self, other: ClassScatter) -> ClassScatter:
        """Add what ``other`` has seen; returns self."""
        if other.shift is None:
            return self
        assert other.sums is not None and other.squares is not None
        if self.shift is None:
            self._start(other.shift.clone())
        assert self.shift is not None and self.sums is not None and self.squares is not None
        d, k = other.shift - self.shift, len(other.counts)
        self._grow(k)
        n = other.counts.view(-1, 1)
        self.squares[:k] += other.squares + 2 * (other.sums * d).sum(2) + n * d.square().sum(1)
        self.sums[:k] += other.sums + n.unsqueeze(2) * d
        self.counts[:k] += other.counts
        return self

    def scatter(self, classes: list[int] | None = None) -> tuple[Tensor, Tensor]:
        """Between- and within-class scatter ``(b, w)``, each (C,) float64, of all or some ``classes``.

        Raises:
            ValueError: if fewer than two of the classes were seen.
        """
        if self.sums is None or self.squares is None:
            raise ValueError("no samples were seen; update with features and labels first")
        chosen = (
            torch.arange(len(self.counts), device="cpu") if classes is None else torch.tensor(classes, device="cpu")
        )
        chosen = chosen[chosen < len(self.counts)].to(self.counts.device)
        chosen = chosen[self.counts[chosen] > 0]
        if len(chosen) < 2:
            raise ValueError(f"scatter needs at least two classes with samples, not {chosen.tolist()}")
        n, sums = self.counts[chosen].view(-1, 1), self.sums[chosen]
        energy = sums.square().sum(2) / n
        w = (self.squares[chosen] - energy).sum(0).clamp(min=0)
        b = (energy.sum(0) - sums.sum(0).square().sum(1) / n.sum()).clamp(min=0)
        return b, w

    def _start(self, shift: Tensor) -> None:
        self.shift = shift
        self.sums = shift.new_zeros(0, *shift.shape)
        self.squares = shift.new_zeros(0, len(shift))
        self.counts = shift.new_zeros(0)

    def _grow(self, classes: int) -> None:
        assert self.sums is not None and self.squares is not None
        missing = classes - len(self.counts)
        if missing > 0:
            self.counts = torch.cat([self.counts, self.counts.new_zeros(missing)])
            self.sums = torch.cat([self.sums, self.sums.new_zeros(missing, *self.sums.shape[1:])])
            self.squares = torch.cat([self.squares, self.squares.new_zeros(missing, self.squares.shape[1])])


@dataclass(frozen=True)
class TraceRatio:
    """The best set of a given size.

    Attributes:
        chosen: channels, ascending, shape (d,).
        ratio: λ(S) = Σ_S b / Σ_S w.
        history: λ per iteration, strictly rising.
    """

    chosen: NDArray[np.int64]
    ratio: float
    history: tuple[float, ...]


def select(b: ArrayLike, w: ArrayLike, d: int) -> TraceRatio:
    r"""Maximise the trace ratio :math:`\sum_S b / \sum_S w` over all sets of d channels.

    S ← the d largest :math:`b_i - \lambda w_i`, λ ← the ratio of S, until λ no longer rises. Monotone, finite and
    globally optimal (Dinkelbach). No channel is dropped before the loop: truncating to the largest
    b/w first, as a widely copied feature-selection code does, makes the loop idle and the set suboptimal.

    Args:
        b: between-class scatter, shape (C,), finite and ≥ 0.
        w: within-class scatter, shape (C,), finite and ≥ 0.
        d: size of the set, 1..C.

    Returns:
        :class:`TraceRatio`. Channels with b + w negligible are taken only if nothing else is left.

    Raises:
        ValueError: for a ``d`` out of range or scatter that is negative or not finite.

    Example:
        >>> select([3.0, 1.0, 4.0], [1.0, 0.1, 4.0], 2).chosen.tolist()
        [0, 1]
    """
    b, w = _checked(b), _checked(w)
    if not 1 <= d <= len(b):
        raise ValueError(f"d={d} must be in 1..{len(b)}")
    total = b + w
    alive = total > NEGLIGIBLE * total.max(initial=0.0)
    best = np.argsort(np.where(alive, -b, np.inf), kind="stable")[:d]
    ratio, history = _ratio(b, w, best), [_ratio(b, w, best)]
    while np.isfinite(ratio):
        value = np.where(alive, b - ratio * w, -np.inf)
        chosen = np.argsort(-value, kind="stable")[:d]
        higher = _ratio(b, w, chosen)
        if not higher > ratio * (1 + 1e-15):
            break
        best, ratio = chosen, higher
        history.append(ratio)
    return TraceRatio(np.sort(best), ratio, tuple(history))


def top_d_values(b: ArrayLike, w: ArrayLike, ratio: float) -> NDArray[np.float64]:
    r"""Concave gain :math:`h(d) = \sum` of the d largest :math:`b_i - \lambda w_i`, d = 0..C; shape (C + 1,).

    Example:
        >>> top_d_values([3.0, 1.0], [1.0, 1.0], 1.0).tolist()
        [0.0, 2.0, 2.0]
    """
    value = np.sort(_checked(b) - ratio * _checked(w))[::-1]
    return np.concatenate([[0.0], np.cumsum(value)])


def _ratio(b: NDArray[np.float64], w: NDArray[np.float64], chosen: NDArray[np.int64]) -> float:
    above, below = float(b[chosen].sum()), float(w[chosen].sum())
    return above / below if below > 0 else (np.inf if above > 0 else 0.0)


def _checked(values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or not np.isfinite(array).all() or (array < 0).any():
        raise ValueError("scatter must be one finite, non-negative value per channel")
    return array
