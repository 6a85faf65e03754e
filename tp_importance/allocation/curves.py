"""Value curves: what a group loses at every width. Where criteria and allocators meet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from ..core.progress import track
from ..core.types import Floats, Ints
from ..graph.groups import ChannelGroup, PrunableGroups
from ..graph.host_group import score_group

__all__ = ["Curve", "Curves", "convex_envelope", "curve_from_scores", "host_scores", "value_curves"]


@dataclass(frozen=True, eq=False)
class Curve:
    """Loss of one group at every width, and which units go.

    Attributes:
        loss: ``loss[c]`` with c units left, any common scale across groups; shape (U + 1,), ``loss[U]`` least.
        order: units in the order they go, shape (U,), int64: the nested way to reach every width.
        kept: units to keep per width where the best sets are not nested; widths not named follow ``order``.
        constant: units that do not vary on the data; they carry nothing and go first.
    """

    loss: Floats
    order: Ints
    kept: Mapping[int, Ints] = field(default_factory=dict)
    constant: Ints = field(default_factory=lambda: np.zeros(0, np.int64))

    def __post_init__(self) -> None:
        if len(self.loss) != len(self.order) + 1 or not np.isfinite(self.loss).all():
            raise ValueError(f"a curve of {len(self.order)} units needs {len(self.order) + 1} finite losses")
        if not np.array_equal(np.sort(self.order), np.arange(len(self.order))):
            raise ValueError("order must be a permutation of the units")

    def removed(self, left: int) -> list[int]:
        """Units to remove so that ``left`` units stay, ascending."""
        if not 0 <= left <= len(self.order):
            raise ValueError(f"{left} of {len(self.order)} units cannot stay")
        if left in self.kept:
            return np.setdiff1d(self.order, self.kept[left]).tolist()
        return sorted(self.order[: len(self.order) - left].tolist())


Curves = Mapping[str, Curve]
"""Curve per group name."""


def convex_envelope(loss: ArrayLike) -> Floats:
    """Largest convex function below ``loss`` on 0..U.

    Greedy allocation needs diminishing returns: behind a bump it would never look.

    Example:
        >>> convex_envelope([4.0, 4.0, 1.0, 0.0]).tolist()
        [4.0, 2.5, 1.0, 0.0]
    """
    y = np.asarray(loss, np.float64)
    hull: list[int] = []
    for i in range(len(y)):
        while len(hull) > 1 and (y[hull[-1]] - y[hull[-2]]) * (i - hull[-2]) >= (y[i] - y[hull[-2]]) * (
            hull[-1] - hull[-2]
        ):
            hull.pop()
        hull.append(i)
    return np.interp(np.arange(len(y)), hull, y[hull])


def curve_from_scores(scores: ArrayLike, constant: Ints | None = None) -> Curve:
    """Curve of a criterion that scores units independently: the loss is the sum of the scores removed.

    Args:
        scores: non-negative score per unit, shape (U,); ties go by position.
        constant: units that do not vary on the data.

    Example:
        >>> curve_from_scores([3.0, 1.0, 2.0]).loss.tolist()
        [6.0, 3.0, 1.0, 0.0]
    """
    s = np.asarray(scores, np.float64)
    order = np.argsort(s, kind="stable").astype(np.int64)
    loss = np.concatenate([np.cumsum(s[order])[::-1], [0.0]])
    return Curve(loss, order, constant=np.zeros(0, np.int64) if constant is None else constant)


def value_curves(importance: Any, groups: PrunableGroups) -> dict[str, Curve]:
    """Curves of any importance: ours by their statistics, Torch-Pruning's by their scores.

    Args:
        importance: has ``curves(groups)``, or is called with a ``tp.Group`` and returns a score per root channel.
        groups: the groups to value.

    Raises:
        ValueError: if a score has the wrong shape or is not finite.
    """
    if hasattr(importance, "curves"):
        return importance.curves(groups)
    return {
        g.name: curve_from_scores(host_scores(importance, groups, g))
        for g in track(groups, "ordering channels", unit="group")
    }


def host_scores(importance: Any, groups: PrunableGroups, group: ChannelGroup) -> Floats:
    """Scores of a Torch-Pruning importance per unit, the mean over the unit's channels; shape (U,).

    Negative scores (first-order criteria) are shifted up to zero: only differences within a group count.
    """
    view, channels, units = score_group(groups, group)
    name = type(importance).__name__
    hint = f"if it reads gradients, give it some: GradientImportance({name}()), or call loss.backward() before"
    try:
        with torch.no_grad():
            scores = importance(view)
    except Exception as error:
        if all(p.grad is None for p in groups.trace.model.parameters()):
            raise ValueError(f"{name} fails on group {group.name} ({type(error).__name__}: {error}); {hint}") from error
        raise
    if not isinstance(scores, torch.Tensor):
        raise ValueError(f"{name} gives no scores for group {group.name}; {hint}")
    values = scores.detach().double().cpu().numpy()
    if values.shape != (len(view[0].idxs),):
        raise ValueError(f"scores of group {group.name} have shape {values.shape}; ({len(view[0].idxs)},) is needed")
    if not np.isfinite(values).all():
        raise ValueError(f"scores of group {group.name} are not finite; check the data and the gradients")
    mean = np.bincount(units, values[channels], group.n_units) / group.unit_size
    return mean - min(mean.min(), 0.0)
