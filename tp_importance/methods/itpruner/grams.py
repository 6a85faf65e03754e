"""Gram matrices of what every group hands on, batch by batch; only n × n numbers per group are kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...graph.groups import ChannelGroup, PrunableGroups
from ...graph.layer_kinds import CONV
from ...statistics.observe import Watch, WatchFn
from .hsic import Estimator, HSICSums, Kernel, centre, gram

__all__ = ["LEAST_SAMPLES", "GramStatistics"]

LEAST_SAMPLES: dict[Estimator, int] = {"biased": 2, "unbiased": 4}
"""Samples without which a batch has no HSIC."""


class GramStatistics:
    """nHSIC between groups from one pass.

    The features of a group are its channels where its first consumer receives them, flattened to one row per sample;
    a consumer that runs several times in a batch adds the features of all its runs. That is behind whatever lies
    between producer and consumer: in a pre-activation network behind the batch norm and ReLU of the first block that
    reads it.

    Args:
        groups: the groups.
        kernel: see :func:`~tp_importance.methods.itpruner.hsic.centre`.
        estimator: see :func:`~tp_importance.methods.itpruner.hsic.centre`.
        pool: average every channel over its positions first.
    """

    def __init__(self, groups: PrunableGroups, *, kernel: Kernel, estimator: Estimator, pool: bool) -> None:
        self._groups, self._model = list(groups), groups.trace.model
        self._kernel, self._estimator, self._pool = kernel, estimator, pool
        self._sums = HSICSums()
        self._samples = 0
        self._grams: dict[str, Tensor] = {}

    def watches(self) -> list[Watch]:
        """What :func:`~tp_importance.statistics.observe.observe` is to watch."""
        return [
            Watch(g.consumers[0].name, self._model.get_submodule(g.consumers[0].name), self._fn(g), by_position=True)
            for g in self._groups
        ]

    def begin(self, samples: int) -> None:
        """A batch begins: finish the one before.

        Raises:
            ValueError: if the batch is too small, or what was seen is not finite.
        """
        self._finish()
        least = LEAST_SAMPLES[self._estimator]
        if samples < least:
            raise ValueError(
                f"a batch of {samples} has no {self._estimator} HSIC, at least {least} samples are needed; take "
                "larger batches, and drop a last one that is smaller (drop_last=True)"
            )
        self._samples = samples

    def nhsic(self) -> NDArray[np.float64]:
        """Normalised HSIC of all pairs of groups over all batches, shape (G, G); 0 for groups that are constant."""
        self._finish()
        return self._sums.normalised()

    def _finish(self) -> None:
        if not self._samples:
            return
        idle = [g for g in self._groups if g.name not in self._grams]
        if idle:
            raise ValueError(
                f"layer {idle[0].consumers[0].name} did not run on the data, so group {idle[0].name} has no statistics"
            )
        centred: list[Tensor] = []
        for g in self._groups:
            found = self._grams.pop(g.name)
            if not torch.isfinite(found).all():
                raise ValueError(
                    f"the input of layer {g.consumers[0].name} is not finite; check the data and the model"
                )
            centred.append(centre(found, kernel=self._kernel, estimator=self._estimator).to(self._device(centred)))
        self._sums.update(centred, self._estimator)
        self._samples = 0

    @staticmethod
    def _device(centred: list[Tensor]) -> torch.device | None:
        """One device for all, where a model is spread over several."""
        return centred[0].device if centred else None

    def _fn(self, group: ChannelGroup) -> WatchFn:
        member = group.consumers[0]
        module: Any = self._model.get_submodule(member.name)
        channels = np.unique(member.channels)
        first, count = int(channels[0]), len(channels)
        run = bool(channels[-1] == first + count - 1)
        index = torch.from_numpy(channels)
        dim = 1 if isinstance(module, CONV) else -1

        def fn(x: Tensor, _out: Tensor, labels: Tensor) -> None:
            x = x.narrow(dim, first, count) if run else x.index_select(dim, index.to(x.device))
            share: Tensor | float = 1.0  # of the positions, those that are no padding
            if labels.dim() == 2 and dim == -1:
                counts = (labels >= 0).to(x)
                x = x * counts.view(*x.shape[:-1], 1)
                share = counts.mean(1, keepdim=True).clamp_min(1 / counts.shape[1])
            if self._pool and x.dim() > 2:
                x = x.mean(list(range(1, x.dim() - 1))) / share if dim == -1 else x.flatten(2).mean(2)
            found = gram(x.reshape(self._samples, -1))
            before = self._grams.get(group.name)
            self._grams[group.name] = found if before is None else before + found

        return fn
