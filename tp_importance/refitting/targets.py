"""What consumers are refitted to: their outputs in the dense network, or what a residual sum lacks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..core.forward import ForwardFn
from ..core.precision import at_least_float, undisturbed
from ..errors import TracingError
from ..graph.activations import watch_activations
from ..graph.dataflow import Flow
from ..graph.patches import bn_gain, require_batched, sampled_output, unfolded_input
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
        self._flow: Flow | None = trace.call(example_inputs, forward_fn) if settings.residual else None
        found = {i: self._added_to(r) for i, r in enumerate(refits)}
        self.sums = {i: other for i, other in found.items() if other is not None}

    def generator(self, i: int) -> torch.Generator:
        """Random numbers for the positions of a consumer, the same ones every time."""
        return torch.Generator().manual_seed(self._settings.seed * 1_000_003 + i)

    def dense(self, i: int, x: Tensor, out: Tensor, generator: torch.Generator) -> Target:
        """What a consumer, whose weight is still the dense one, gives at the sampled positions.

        Args:
            i: the consumer.
            x: its input.
            out: its output.
            generator: draws the positions.
        """
        r = self._refits[i]
        require_batched(r.name, r.module, x)
        u = unfolded_input(r.module, x, out, self._settings.sampled, generator)
        return Target(torch.einsum("nqgd,god->nqgo", u, r.weight.to(u)), tuple(out.shape))

    def with_sum(self, i: int, target: Target, dense: Tensor, pruned: Tensor) -> Target:
        """Target with which the sum is that of the dense network; outputs of negligible gain keep their own.

        Args:
            i: the consumer.
            target: what it gave in the dense network.
            dense: what this was added to, at the sampled positions.
            pruned: the same in the network pruned so far.
        """
        r = self._refits[i]
        gain = bn_gain(r.batch_norm, dense.shape[2]).to(dense)
        usable = gain.abs() > NEGLIGIBLE_GAIN * gain.abs().max()
        wanted = torch.where(usable, (dense - pruned) / torch.where(usable, gain, 1.0), 0.0)
        return replace(target, y=target.y + wanted.view(target.y.shape).to(target.y))

    def rows(self, i: int, x: Tensor, target: Target, generator: torch.Generator) -> Tensor:
        """Input of a consumer in the pruned network, unfolded at the positions of its target; shape (N, Q, G, d)."""
        frame = torch.empty(target.shape, device="meta")  # only its shape is looked at
        return unfolded_input(self._refits[i].module, x, frame, self._settings.sampled, generator)

    @contextmanager
    def summands(
        self, model: nn.Module, into: Mapping[int, tuple[dict[int, Tensor], torch.Generator]]
    ) -> Iterator[None]:
        """While ``model`` runs, store what is added to the consumers ``into``, at their sampled positions.

        Args:
            model: the dense network, or the one pruned so far.
            into: per consumer of :attr:`sums` where to store it, under the consumer's number, and what draws positions.

        Raises:
            ValueError: if the model does other operations than on the example inputs.
        """
        consumers: dict[int, list[int]] = {}
        for i in into:
            consumers.setdefault(self.sums[i], []).append(i)

        def keep(value: int, tensor: Tensor) -> None:
            for i in consumers[value]:
                store, generator = into[i]
                module = self._refits[i].module
                with undisturbed(tensor.device):
                    store[i] = sampled_output(module, at_least_float(tensor), self._settings.sampled, generator)

        if self._flow is None or not into:
            yield
            return
        looks: dict[int, Callable[[Tensor], None]] = {value: partial(keep, value) for value in consumers}
        try:
            with watch_activations(model, self._flow, looks):
                yield
        except TracingError as error:
            raise ValueError(f"{error}: its control flow depends on the data; pass Refit(residual=False)") from error

    def _added_to(self, r: LayerRefit) -> int | None:
        return None if self._flow is None else added_to(self._flow, r.name, r.batch_norm)
