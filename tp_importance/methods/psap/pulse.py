"""The pulse after a prune step: gates feel what the loss thinks of masked units, and some of these come back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ...core.guards import Guard
from ...graph.gates import ChannelGates
from .soft_masks import SoftMasks
from .sparsity import outliers

__all__ = ["PulsedMasks"]


class PulsedMasks(SoftMasks):
    """Masks that gates put into effect, and that are corrected by the gradients of the gates.

    Args:
        *args: see :class:`.SoftMasks`.
        **options: see :class:`.SoftMasks`.

    Attributes:
        optimizers: momentum of masked filters is zeroed in them.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._pulse_left, self._pulse_count = 0, 0
        self._pulse_sum: Tensor | None = None
        self._frozen = False
        self._gates: ChannelGates | None = None
        self.optimizers: list[Optimizer] = []

    def close(self) -> None:
        """Take the gates out; nothing is masked then."""
        if self._gates is not None:
            self._gates.remove()
        self._gates = None

    def paused(self) -> Guard:
        """A block without the gates; if it raises before its ``commit()``, they come back."""
        return _Paused(self)

    def reopen(self) -> None:
        """Put the gates back."""
        self._gates = ChannelGates(self.groups)
        self._gates.set(self.masked)
        self._gates.watch(self._pulse_left > 0)

    @property
    def started(self) -> bool:
        """Whether the gates are in."""
        return self._gates is not None

    @property
    def frozen(self) -> bool:
        """Whether the masks are final: after the last pulse."""
        return self._frozen

    def _begin_pulse(self, length: int, *, last: bool) -> None:
        """Put new masks into effect, and watch the gates for some optimizer steps; the last masks may be final."""
        self._pulse_left, self._pulse_count, self._pulse_sum = length, 0, None
        self._frozen = last and not length
        self._apply(self._started())

    def _watch(self, gates: ChannelGates, *, last: bool) -> None:
        gradient = gates.take_gradient()
        if gradient is None:
            raise RuntimeError(
                "no gradient has reached the gates since the last step(): call it once after each loss.backward() and "
                "optimizer.step(), in this order"
            )
        if bool(torch.isfinite(gradient).all()):  # a gradient scaler skips such steps, too
            gradient = gradient.abs()
            self._pulse_sum = gradient if self._pulse_sum is None else self._pulse_sum.to(gradient.device) + gradient
            self._pulse_count += 1
        self._pulse_left -= 1
        if not self._pulse_left:
            self._end_pulse(gates, last=last)

    def _end_pulse(self, gates: ChannelGates, *, last: bool) -> None:
        changes: dict[str, dict[str, tuple[int, ...]]] = {}
        if self._pulse_sum is not None:
            mean = (self._pulse_sum.double() / self._pulse_count).cpu().numpy()
            for name, strength in gates.split(mean).items():
                found = outliers(strength, self.masked[name])
                if len(found):
                    changes[name] = self._restore(self.groups[name], found, strength, last)
        self.history.steps[-1] = self.history.steps[-1].with_pulse(changes)
        self._pulse_left, self._pulse_count, self._pulse_sum = 0, 0, None
        self._frozen = last
        self._apply(gates)

    def _apply(self, gates: ChannelGates) -> None:
        gates.set(self.masked)
        gates.watch(self._pulse_left > 0)
        self._weights.zero_momentum(self.optimizers, self.masked)

    def _started(self) -> ChannelGates:
        if self._gates is None:
            raise RuntimeError("call start(optimizer, total_steps=...) before the training loop, and step() inside it")
        return self._gates


class _Paused(Guard):
    """A soft phase without its gates; see :meth:`PulsedMasks.paused`."""

    def __init__(self, soft: PulsedMasks) -> None:
        super().__init__()
        self._soft = soft

    def _note(self) -> None:
        self._soft._started()
        self._soft.close()

    def _restore(self, failed: bool) -> None:
        if failed and not self._committed:
            self._soft.reopen()
