"""One safe way to trace a network: Torch-Pruning's graph plus what each layer was called with."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from ..core.arguments import checked_model
from ..core.batches import tensors_in
from ..core.devices import misplaced
from ..core.forward import fresh_inputs
from ..core.untouched import untouched
from ..errors import TracingError
from .counting import Call, CallRecorder, batch_size
from .layer_kinds import is_batch_norm
from .layer_pruners import channel_pruners, is_frozen_norm
from .reparametrised import as_leaves

__all__ = ["Trace", "TraceOptions", "trace"]


@dataclass(frozen=True)
class TraceOptions:
    """What Torch-Pruning needs to trace unusual networks; the fields have its names and meaning."""

    forward_fn: Callable[[nn.Module, Any], Any] | None = None
    output_transform: Callable[[Any], Any] | None = None
    unwrapped_parameters: Sequence[tuple[nn.Parameter, int]] | None = None
    customized_pruners: Mapping[Any, Any] | None = None
    ignored_params: Sequence[nn.Parameter] = ()

    def on_copy(self, model: nn.Module, copy: nn.Module) -> TraceOptions:
        """The same options, with every module and parameter of ``model`` replaced by its twin in ``copy``."""
        modules: dict[Any, Any] = dict(zip(model.modules(), copy.modules(), strict=True))
        given = self.customized_pruners or {}
        types = {type(module): type(twin) for module, twin in modules.items()}  # parametrised layers have their own
        pruners = {modules.get(k, types.get(k, k)): v for k, v in given.items()} or None
        renamed = self.renamed({p: name for name, p in model.named_parameters()}, copy)
        return replace(renamed, customized_pruners=pruners)

    def renamed(self, names: Mapping[Any, str], model: nn.Module) -> TraceOptions:
        """The same options, with every parameter replaced by the one that has its name in ``model`` now.

        Args:
            names: names of the parameters, those that surgery has replaced among them.
            model: the network.
        """
        now = dict(model.named_parameters())

        def twin(p: nn.Parameter) -> nn.Parameter:
            return now.get(names.get(p, ""), p)

        return replace(
            self,
            unwrapped_parameters=[(twin(p), dim) for p, dim in self.unwrapped_parameters or ()] or None,
            ignored_params=[twin(p) for p in self.ignored_params],
        )


@dataclass
class Trace:
    """A traced network: dependency graph, calls in execution order, the example inputs and their batch size.

    Attributes:
        functional: multiply-accumulates of functions that read parameters outside of
            :data:`~tp_importance.graph.layer_kinds.COUNTED` modules, whole batch, by name of the parameter.
        uncounted: reason per module or parameter whose multiply-accumulates are not known.
    """

    model: nn.Module
    graph: Any
    calls: list[Call]
    batch_size: int
    example_inputs: Any
    names: dict[nn.Module | nn.Parameter, str] = field(default_factory=dict)
    functional: dict[str, int] = field(default_factory=dict)
    uncounted: dict[str, str] = field(default_factory=dict)

    def first_call(self) -> dict[str, int]:
        """Position of the first call of each module in execution order."""
        order: dict[str, int] = {}
        for i, call in enumerate(self.calls):
            order.setdefault(call.name, i)
        return order

    def batch_norm_behind(self, name: str) -> nn.Module | None:
        """The batch norm that alone receives the output of a layer, if there is one."""
        node = self.graph.module2node.get(self.model.get_submodule(name))
        followers = [] if node is None else node.outputs
        if len(followers) != 1:
            return None
        frozen = is_frozen_norm(followers[0].module)
        if is_batch_norm(followers[0].module) and (not frozen or "BatchNorm" in followers[0].grad_fn.name()):
            return followers[0].module
        behind = followers[0].outputs
        if len(behind) == 1 and is_frozen_norm(behind[0].module) and len(followers[0].inputs) == 1:
            # Torch-Pruning sees the last operation of a module as the module: x * scale, then + shift
            steps = [n.grad_fn.name() for n in (followers[0], behind[0])]
            if steps == ["MulBackward0", "AddBackward0"] and len(behind[0].inputs) == 1:
                return behind[0].module
        return None


def _outputs(value: Any) -> list[Tensor]:
    """The tensors among what a network returns."""
    found = tensors_in(value)
    if not found:
        raise TypeError(f"the network returns no tensor, but {type(value).__name__}; give output_transform")
    return found


def trace(model: nn.Module, example_inputs: Any, options: TraceOptions = TraceOptions()) -> Trace:
    """Trace ``model`` with Torch-Pruning, whatever state it is in, and leave that state alone.

    Torch-Pruning needs gradients and trainable parameters and leaves the model in eval mode, with its hooks
    in place if the forward pass raises. Here gradients are enabled for the trace only, frozen parameters are
    thawed and frozen again, and modes, hooks and all that the forward pass writes into the model (caches, counters,
    buffers) are restored on every exit. The network runs on clones of the example inputs.

    Args:
        model: the network.
        example_inputs: tensor, tuple of positional or dict of keyword arguments, batch dimension first.
        options: how to call and read the network, see :class:`TraceOptions`.

    Returns:
        The :class:`Trace`.

    Raises:
        TypeError: if the model is none, or compiled.
        TracingError: if the forward pass or Torch-Pruning's graph construction fails.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> sum(c.macs for c in trace(net, torch.zeros(1, 3, 8, 8)).calls)
        12384
    """
    checked_model(model)
    n = batch_size(example_inputs)
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
        recorder = CallRecorder(model)
        try:
            graph = tp.DependencyGraph().build_dependency(
                model,
                example_inputs=fresh_inputs(example_inputs),
                forward_fn=partial(recorder.run, forward_fn=options.forward_fn),
                output_transform=options.output_transform or _outputs,
                unwrapped_parameters=list(options.unwrapped_parameters or ()) or None,
                customized_pruners=pruners,
                ignored_params=list(options.ignored_params),
            )
        except Exception as error:
            remedy = misplaced(model, example_inputs) or (
                "Check that the model runs on example_inputs (device, dtype, shape); give forward_fn or "
                "output_transform for unusual signatures"
            )
            raise TracingError(
                f"could not trace {type(model).__name__}: {type(error).__name__}: {error}. {remedy}"
            ) from error
        finally:
            recorder.remove()
    names: dict[nn.Module | nn.Parameter, str] = {m: name for name, m in model.named_modules()}
    names.update({p: name for name, p in model.named_parameters()})
    return Trace(model, graph, recorder.calls, n, example_inputs, names, *recorder.functional(n))
