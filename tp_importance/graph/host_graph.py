"""Torch-Pruning's dependency graph of a network, built whatever state the network is in."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from typing import Any

import torch
import torch_pruning as tp
from torch import nn

from ..core.forward import call_model, fresh_inputs
from ..core.untouched import untouched
from ..errors import TracingError
from .layer_pruners import channel_pruners
from .reparametrised import as_leaves
from .trace_options import TraceOptions, failed_trace, output_tensors

__all__ = ["host_graph"]


def host_graph(model: nn.Module, example_inputs: Any, options: TraceOptions = TraceOptions()) -> Any:
    """Build Torch-Pruning's dependency graph, and leave the network as it is.

    Torch-Pruning needs gradients and trainable parameters and leaves the model in eval mode, with its hooks
    in place if the forward pass raises. Here gradients are enabled for the trace only, frozen parameters are
    thawed and frozen again, and modes, hooks and all that the forward pass writes into the model (caches, counters,
    buffers) are restored on every exit. The network runs on clones of the example inputs.

    Args:
        model: the network.
        example_inputs: tensor, tuple of positional or dict of keyword arguments, batch dimension first.
        options: how to call and read the network; its pruning functions are completed by
            :func:`~tp_importance.graph.layer_pruners.channel_pruners`.

    Returns:
        The ``tp.DependencyGraph``.

    Raises:
        TracingError: if the forward pass or Torch-Pruning's construction fails.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> graph = host_graph(net, torch.zeros(1, 3, 8, 8))
        >>> len(list(graph.get_all_groups()))
        2
    """
    # the graph keeps autograd's nodes for their shapes; without the hooks, every activation would stay with them
    nothing_saved = torch.autograd.graph.saved_tensors_hooks(lambda _tensor: None, lambda nothing: nothing)
    with (
        untouched(model),
        torch.inference_mode(False),
        torch.enable_grad(),
        nothing_saved,
        warnings.catch_warnings(),
        ExitStack() as stack,
    ):
        warnings.filterwarnings("ignore", message="Unwrapped parameters detected")
        for name, parameter in model.named_parameters():
            if parameter.is_inference():
                raise TracingError(
                    f"parameter {name} was made under torch.inference_mode (by .to() or a load, say) and can take no "
                    "gradient; move or load the model outside of it"
                )
            if parameter.is_floating_point():
                parameter.requires_grad_(True)
        pruners = channel_pruners(model, options.customized_pruners) or None  # copies layers, so before any hook
        stack.enter_context(as_leaves(model))
        try:
            return tp.DependencyGraph().build_dependency(
                model,
                example_inputs=fresh_inputs(example_inputs),
                forward_fn=options.forward_fn or call_model,
                output_transform=options.output_transform or output_tensors,
                unwrapped_parameters=list(options.unwrapped_parameters or ()) or None,
                customized_pruners=pruners,
                ignored_params=list(options.ignored_params),
            )
        except Exception as error:
            raise failed_trace(model, example_inputs, error) from error
