"""Masked networks whose norms run over channels: NNI's masks zero weights, and say nothing of the statistics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tp_importance.graph.gates import ChannelGates
from tp_importance.graph.groups import PrunableGroups

from .units import dead_units, masked_axes

__all__ = ["MaskedNorms", "under_norms"]


def under_norms(groups: PrunableGroups) -> PrunableGroups:
    """The groups whose masked channels are not zero everywhere, or change others, if only weights are masked.

    These are groups with statistics over their channels, and those that tensors without a layer (embeddings of
    positions) add something to.

    Args:
        groups: all groups.
    """
    plain = [g.name for g in groups if not g.statistics and all(m.axis is None for m in g.members)]
    return groups.exclude(dict.fromkeys(plain, "its masks say all"))


class MaskedNorms:
    """Lets a wrapped network compute what the sped-up one will, where masks of weights alone do not say it.

    Masked units of the groups of :func:`under_norms` are closed by gates where layers read them, and statistics over
    channels run over those that are kept.

    Args:
        groups: of the network.
    """

    def __init__(self, groups: PrunableGroups) -> None:
        self._groups = under_norms(groups)
        self._gates: ChannelGates | None = None
        self._handle: RemovableHandle | None = None

    def set(self, masks: Mapping[str, Mapping[str, Tensor | None]]) -> None:
        """Follow new masks; of a network that is not wrapped, nothing is masked.

        Args:
            masks: all masks, as NNI's wrappers hold them.
        """
        if not len(self._groups) or not self._wrapped():
            return
        model = self._groups.trace.model
        given = {name: {t: m for t, m in targets.items() if m is not None} for name, targets in masks.items()}
        axes = masked_axes(model, given)
        masked = {}
        for g in self._groups:
            dead = np.fromiter(dead_units(g, axes), np.int64)
            masked[g.name] = np.isin(np.arange(g.n_units), dead)
        if not any(mask.any() for mask in masked.values()):
            self.remove()
            return
        if self._gates is None:
            self._gates = ChannelGates(self._groups)
            self._handle = model.register_forward_pre_hook(self._checked(), prepend=True)
        self._gates.set(masked)

    def remove(self) -> None:
        """Take the gates out."""
        if self._gates is not None:
            self._gates.remove()
        if self._handle is not None:
            self._handle.remove()
        self._gates = self._handle = None

    def _checked(self) -> Any:
        """Whoever unwraps the network, it is no longer masked then."""

        def hook(_model: nn.Module, _args: Any) -> None:
            if not self._wrapped():
                self.remove()

        return hook

    def _wrapped(self) -> bool:
        model = self._groups.trace.model
        return any(hasattr(model.get_submodule(m.name), "_nni_wrapper") for g in self._groups for m in g.producers)
