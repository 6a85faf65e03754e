"""One safe way to trace a network: Torch-Pruning's graph plus what each layer was called with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import nn

from ..core.arguments import checked_model
from ..core.devices import to_model
from ..core.forward import ForwardFn
from .counting import Call, CallRecorder, batch_size
from .dataflow import Flow, record
from .following import batch_norm_behind, feeds_alone
from .host_graph import host_graph
from .trace_options import TraceOptions

__all__ = ["Trace", "trace"]


@dataclass
class Trace:
    """A traced network: dependency graph, calls in execution order, the example inputs and their batch size.

    Attributes:
        functional: multiply-accumulates of functions that read parameters outside of
            :data:`~tp_importance.graph.layer_kinds.COUNTED` modules, whole batch, by name of the parameter.
        uncounted: reason per module or parameter whose multiply-accumulates are not known.
        forward_fn: how the network is called; ``None``: with the example inputs.
    """

    model: nn.Module
    graph: Any
    calls: list[Call]
    batch_size: int
    example_inputs: Any
    names: dict[nn.Module | nn.Parameter, str] = field(default_factory=dict)
    functional: dict[str, int] = field(default_factory=dict)
    uncounted: dict[str, str] = field(default_factory=dict)
    forward_fn: ForwardFn | None = None

    def first_call(self) -> dict[str, int]:
        """Position of the first call of each module in execution order."""
        order: dict[str, int] = {}
        for i, call in enumerate(self.calls):
            order.setdefault(call.name, i)
        return order

    @cached_property
    def flow(self) -> Flow:
        """What reads what in the network, by one more forward pass when it is first asked for."""
        inputs = to_model(self.model, self.example_inputs)  # the network may have moved meanwhile
        return record(self.model, inputs, forward_fn=self.forward_fn)

    def batch_norm_behind(self, name: str, *, alone: bool = False) -> nn.Module | None:
        """The batch norm that alone receives the output of a layer, if there is one.

        Args:
            name: qualified name of the layer.
            alone: only if no other layer feeds the batch norm: then its mean is free to change with this one.
        """
        layer = self.model.get_submodule(name)
        norm = batch_norm_behind(self.flow, layer)
        return norm if norm is not None and (not alone or feeds_alone(self.flow, layer, norm)) else None


def trace(model: nn.Module, example_inputs: Any, options: TraceOptions = TraceOptions()) -> Trace:
    """Trace ``model`` with Torch-Pruning, whatever state it is in, and leave that state alone.

    Modes, gradient flags, hooks and all that the forward pass writes into the model are restored on every exit, see
    :func:`~tp_importance.graph.host_graph.host_graph`. The network runs on clones of the example inputs.

    Args:
        model: the network.
        example_inputs: tensor, tuple of positional or dict of keyword arguments, batch dimension first.
        options: how to call and read the network, see :class:`~tp_importance.graph.trace_options.TraceOptions`.

    Returns:
        The :class:`Trace`.

    Raises:
        TypeError: if the model is none, or compiled.
        TracingError: if the forward pass or Torch-Pruning's graph construction fails.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> sum(c.macs for c in trace(net, torch.zeros(1, 3, 8, 8)).calls)
        12384
    """
    checked_model(model)
    n = batch_size(example_inputs)
    recorders: list[CallRecorder] = []
    graph = host_graph(model, example_inputs, replace(options, forward_fn=_recorded(options.forward_fn, recorders)))
    (recorder,) = recorders
    names: dict[nn.Module | nn.Parameter, str] = {m: name for name, m in model.named_modules()}
    names.update({p: name for name, p in model.named_parameters()})
    functional, uncounted = recorder.functional(n)
    return Trace(model, graph, recorder.calls, n, example_inputs, names, functional, uncounted, options.forward_fn)


def _recorded(forward_fn: ForwardFn | None, recorders: list[CallRecorder]) -> Callable[[nn.Module, Any], Any]:
    """The same ``forward_fn``, which puts down in ``recorders`` what it calls."""

    def run(model: nn.Module, inputs: Any) -> Any:
        recorder = CallRecorder(model)
        recorders.append(recorder)
        try:
            return recorder.run(model, inputs, forward_fn)
        finally:
            recorder.remove()

    return run
