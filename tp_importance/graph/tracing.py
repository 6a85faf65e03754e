"""One safe way to trace a network: which channels are coupled, and what each layer was called with."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from ..core.arguments import checked_model
from ..core.devices import to_model
from ..core.forward import call_model, fresh_inputs
from ..core.untouched import untouched
from .activations import recording
from .counting import Call, CallRecorder, batch_size, per_sample
from .dataflow import Flow, record
from .following import batch_norm_behind, feeds_alone
from .labels.attention import answers as attention_answers
from .labels.discover import labels_of
from .labels.ledger import Ledger
from .layer_pruners import users_layers
from .reads import Reads, reading
from .reparametrised import as_leaves, computed_tensors
from .trace_options import TraceOptions, failed_trace, output_tensors

__all__ = ["Trace", "set_mode", "trace"]


@dataclass
class Trace:
    """A traced network: labels, calls in execution order, the example inputs and their batch size.

    Attributes:
        labels: which channels live and die together.
        functional: multiply-accumulates of functions that read parameters outside of
            :data:`~tp_importance.graph.layer_kinds.COUNTED` modules, whole batch, by name of the parameter.
        products: multiply-accumulates of data with data, whole batch, as QKᵀ; 0 if they are not to be counted.
        uncounted: reason per module or parameter whose multiply-accumulates are not known.
        options: how the network is called and read.
        reads: what the pass has read; ``None`` if weights are computed, which it saw as leaves.
    """

    model: nn.Module
    labels: Ledger
    calls: list[Call]
    batch_size: int
    example_inputs: Any
    names: dict[nn.Module | nn.Parameter, str] = field(default_factory=dict)
    functional: dict[str, int] = field(default_factory=dict)
    uncounted: dict[str, str] = field(default_factory=dict)
    options: TraceOptions = TraceOptions()
    products: int = 0
    reads: Reads | None = field(default=None, repr=False)

    def first_call(self) -> dict[str, int]:
        """Position of the first call of each module in execution order."""
        order: dict[str, int] = {}
        for i, call in enumerate(self.calls):
            order.setdefault(call.name, i)
        return order

    @property
    def ops(self) -> tuple[int, int]:
        """What :func:`~tp_importance.graph.counting.count_ops` gives: multiply-accumulates per sample, parameters."""
        macs = per_sample(self.calls, self.functional, self.products, self.batch_size)
        return macs, sum(math.prod(p.shape) for p in self.model.parameters())

    @cached_property
    def flow(self) -> Flow:
        """What reads what in the network, by one more forward pass when it is first asked for."""
        inputs = to_model(self.model, self.example_inputs)  # the network may have moved meanwhile
        return record(self.model, inputs, forward_fn=self.options.forward_fn)

    @cached_property
    def _call(self) -> Flow | None:
        inputs = to_model(self.model, self.example_inputs)
        return recording(self.model, inputs, self.options.forward_fn, known=self.flow)

    def call(self, example_inputs: Any, forward_fn: Callable[[nn.Module, Any], Any] | None) -> Flow | None:
        """The same of the call of the network alone, see :func:`~tp_importance.graph.activations.recording`.

        Args:
            example_inputs: recorded once if they are those of the trace.
            forward_fn: as the trace's, too.
        """
        if example_inputs is self.example_inputs and forward_fn is self.options.forward_fn:
            return self._call
        return recording(self.model, example_inputs, forward_fn)

    def batch_norm_behind(self, name: str, *, alone: bool = False) -> nn.Module | None:
        """The batch norm that alone receives the output of a layer, if there is one.

        Args:
            name: qualified name of the layer.
            alone: only if no other layer feeds the batch norm: then its mean is free to change with this one.
        """
        layer = self.model.get_submodule(name)
        norm = batch_norm_behind(self.flow, layer)
        return norm if norm is not None and (not alone or feeds_alone(self.flow, layer, norm)) else None


def trace(
    model: nn.Module, example_inputs: Any, options: TraceOptions = TraceOptions(), *, training: bool = False
) -> Trace:
    """Run ``model`` with labels beside all tensors, whatever state it is in, and leave that state alone.

    Once, and once more if there is attention, see :mod:`.labels.attention`.

    Modes, gradient flags, hooks and all that the forward pass writes into the model (caches, counters, buffers) are
    restored on every exit. The network runs on clones of the example inputs.

    Args:
        model: the network.
        example_inputs: tensor, tuple of positional or dict of keyword arguments, batch dimension first.
        options: how to call and read the network, see :class:`~tp_importance.graph.trace_options.TraceOptions`.
        training: run in training mode, but for batch norms and dropout.

    Returns:
        The :class:`Trace`.

    Raises:
        TypeError: if the model is none, or compiled.
        TracingError: if the forward pass fails, or returns no tensor.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> sum(c.macs for c in trace(net, torch.zeros(1, 3, 8, 8)).calls)
        12384
    """
    checked_model(model)
    n = batch_size(example_inputs)
    names: dict[nn.Module | nn.Parameter, str] = {m: name for name, m in model.named_modules()}
    names.update({p: name for name, p in model.named_parameters()})
    custom = users_layers(model, options.customized_pruners)
    axes = {id(p): dim for p, dim in options.unwrapped_parameters or ()}
    attention = "" if options.with_heads else options.attention  # of layers that the user names dimensions go
    run, reads = options.forward_fn or call_model, Reads()

    def labels(
        run: Callable[[nn.Module, Any], Any], answers: Mapping[int, int], before: Ledger | None = None
    ) -> Ledger:
        return labels_of(
            model,
            fresh_inputs(example_inputs),
            run,
            partial(output_tensors, transform=options.output_transform),
            axes=axes,
            custom=custom,
            answers=answers,
            before=before,
            attention=attention,
        )

    try:
        with untouched(model), torch.inference_mode(False), as_leaves(model), reading(model, reads) as mode:

            def watched(net: nn.Module, inputs: Any) -> Any:
                with mode():
                    return run(net, inputs)

            set_mode(model, training)
            recorder = CallRecorder(model)  # its hooks go with all others
            ledger = labels(lambda net, inputs: recorder.run(net, inputs, watched), {})
        found = attention_answers(ledger, options.attention, options.with_heads)
        if found:  # what the first pass caches would change the numbers of operations
            with untouched(model), torch.inference_mode(False), as_leaves(model):
                set_mode(model, training)
                ledger = labels(run, found, ledger)
    except torch.OutOfMemoryError:  # says nothing about the network
        raise
    except Exception as error:
        raise failed_trace(model, example_inputs, error) from error
    functional, uncounted = recorder.functional(n)
    products = recorder.products if options.count_attention else 0
    return Trace(
        model,
        ledger,
        recorder.calls,
        n,
        example_inputs,
        names,
        functional,
        uncounted,
        options,
        products,
        None if any(map(computed_tensors, model.modules())) else reads,
    )


# Batch norms that normalise by the batch refuse a single value per channel, and dropout only draws random numbers.
_ALWAYS_EVAL = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)


def set_mode(model: nn.Module, training: bool) -> None:
    """Eval mode, or the mode of a training in which batch norms and dropout stay in eval mode."""
    model.eval()
    if training:
        for module in model.modules():
            module.training = not isinstance(module, _ALWAYS_EVAL)
