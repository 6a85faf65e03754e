"""What consumers are refitted to: their outputs in the dense network, or what a residual sum lacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..core.forward import ForwardFn
from ..graph.dataflow import Flow
from ..graph.patches import bn_gain, fork, require_batched, sampled_output, unfolded_input
from ..graph.residual_sums import added_to
from ..graph.tracing import Trace
from .layers import LayerRefit
from .settings import Refit

__all__ = ["Target", "Targets"]

NEGLIGIBLE_GAIN = 1e-3
"""Batch norm gains below this fraction of the largest: what stands behind them cannot make up for anything."""


@dataclass(frozen=True)
class Target:
    """One call of a consumer in the dense network: outputs without bias at the sampled positions, and their frame.

    Attributes:
        y: shape (N, Q, G, O).
        shape: shape of the whole output.
    """

    y: Tensor
    shape: tuple[int, ...]


class Targets:
    """Where targets come from; consumers go by their number in ``refits``.

    Args:
        trace: of the network.
        refits: consumers to be refitted, in execution order.
        settings: of the refit.
        example_inputs: as what the groups were traced with.
        forward_fn: ``forward_fn(model, batch)``.

    Attributes:
        flow: operations of the network, with ``residual``.
        sums: per consumer whose output, behind a batch norm of its own if any, is added to something already there,
            the number of that tensor.
    """

    def __init__(
        self,
        trace: Trace,
        refits: Sequence[LayerRefit],
        settings: Refit,
        example_inputs: Any,
        forward_fn: ForwardFn | None,
    ) -> None:
        self._refits, self._settings = refits, settings
        self.flow: Flow | None = trace.call(example_inputs, forward_fn) if settings.residual else None
        found = {i: self._added_to(r) for i, r in enumerate(refits)}
        self.sums = {i: other for i, other in found.items() if other is not None}

    def generator(self, i: int) -> torch.Generator:
        """Random numbers for the positions of a consumer, the same ones every time."""
        return torch.Generator().manual_seed(self._settings.seed * 1_000_003 + i)

    def dense(self, i: int, x: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Target:
        """What a consumer gives in the dense network at the sampled positions.

        Args:
            i: the consumer.
            x: its input.
            shape: of its output.
            generator: draws the positions.
        """
        r = self._refits[i]
        require_batched(r.name, r.module, x)
        frame = torch.empty(shape, device="meta")  # only its shape is looked at
        u = unfolded_input(r.module, x, frame, self._settings.sampled, generator)
        return Target(torch.einsum("nqgd,god->nqgo", u, r.weight.to(u)), shape)

    def with_sum(self, i: int, target: Target, dense: Tensor, pruned: Tensor, generator: torch.Generator) -> Target:
        """Target with which the sum is that of the dense network; outputs of negligible gain keep their own.

        Args:
            i: the consumer.
            target: what it gave in the dense network.
            dense: what this is added to there.
            pruned: the same in the network pruned so far.
            generator: draws the positions.
        """
        r, again = self._refits[i], fork(generator)
        dense, pruned = (
            sampled_output(r.module, x, self._settings.sampled, draws)
            for x, draws in ((dense, again), (pruned, generator))
        )
        gain = bn_gain(r.batch_norm, dense.shape[2]).to(dense)
        usable = gain.abs() > NEGLIGIBLE_GAIN * gain.abs().max()
        wanted = torch.where(usable, (dense - pruned) / torch.where(usable, gain, 1.0), 0.0)
        return replace(target, y=target.y + wanted.view(target.y.shape).to(target.y))

    def rows(self, i: int, x: Tensor, target: Target, generator: torch.Generator) -> Tensor:
        """Input of a consumer in the pruned network, unfolded at the positions of its target; shape (N, Q, G, d)."""
        frame = torch.empty(target.shape, device="meta")  # only its shape is looked at
        return unfolded_input(self._refits[i].module, x, frame, self._settings.sampled, generator)

    def _added_to(self, r: LayerRefit) -> int | None:
        return None if self.flow is None else added_to(self.flow, r.name, r.batch_norm)
