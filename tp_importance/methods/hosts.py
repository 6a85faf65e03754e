"""Criteria of Torch-Pruning under names of their own, and the random baseline."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor

from ..pruning.domains import Choice
from ..pruning.gradient_importance import GradientImportance
from ..pruning.registry import register_method

__all__ = ["RandomImportance"]


class RandomImportance(tp.importance.Importance):
    """Random scores, the baseline; Torch-Pruning's cannot be seeded.

    Args:
        seed: of the scores.
    """

    def __init__(self, *, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, group: Any) -> Tensor:
        """Scores of a ``tp.Group``, shape (len(group[0].idxs),)."""
        return torch.rand(len(group[0].idxs), generator=self._generator, device="cpu")


def _taylor(**options: Any) -> GradientImportance:
    return GradientImportance(tp.importance.TaylorImportance(**options))


register_method("magnitude", tp.importance.MagnitudeImportance, options={"p": Choice((1, 2))})
register_method("l1", partial(tp.importance.MagnitudeImportance, p=1))
register_method("l2", partial(tp.importance.MagnitudeImportance, p=2))
register_method("fpgm", tp.importance.FPGMImportance)
register_method("taylor", _taylor)
register_method("random", RandomImportance)
