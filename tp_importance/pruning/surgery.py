"""A block in which a target changes its model: all of it happens, or nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ..core.guards import transaction

__all__ = ["Surgery"]


class Surgery(transaction):
    """A block in which a target changes its model; if it raises, both are as before."""

    def __init__(self, target: Any, values: Iterable[torch.Tensor] = ()) -> None:
        """A block for one surgery.

        Args:
            target: a :class:`~tp_importance.pruning.target.PruningTarget`.
            values: parameters that are written into; buffers, which are few, always come back.
        """
        super().__init__(target.model, (*values, *target.model.buffers()))
        self._target = target

    def _note(self) -> None:
        super()._note()
        self._state = dict(vars(self._target))

    def _restore(self, failed: bool) -> None:
        super()._restore(failed)
        if failed:
            target = self._target
            vars(target).clear()
            vars(target).update(self._state)
