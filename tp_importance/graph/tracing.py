"""One safe way to trace a network: Torch-Pruning's graph plus what each layer was called with."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from ..core.arguments import checked_model
from ..core.batches import sample_count, tensors_in
from ..core.devices import misplaced
from ..core.forward import call_model, fresh_inputs
from ..core.untouched import untouched
from ..errors import TracingError
from .layer_pruners import channel_pruners, is_frozen_norm
from .operations import Operations
from .reparametrised import as_leaves

__all__ = [
    "COUNTED",
    "Call",
    "Trace",
    "TraceOptions",
    "batch_size",
    "count_ops",
    "is_batch_norm",
    "is_depthwise",
    "trace",
]

CONV = (nn.modules.conv._ConvNd,)
COUNTED = (nn.modules.conv._ConvNd, nn.Linear, nn.MultiheadAttention)
"""Modules whose multiply-accumulates are counted."""


@dataclass(frozen=True)
class Call:
    """One call of one leaf module during the traced forward pass.

    Attributes:
        name: the module's qualified name.
        in_shape: shape of its first tensor argument.
        out_shape: shape of its (first) output.
        macs: multiply-accumulates of this call, whole batch, for :data:`COUNTED` modules; 0 for other modules.
    """

    name: str
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    macs: int


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
        functional: multiply-accumulates of functions that read parameters outside of :data:`COUNTED` modules, whole
            batch, by name of the parameter.
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


def is_batch_norm(module: nn.Module | None) -> bool:
    """Whether ``module`` is a batch norm: one of torch, or a frozen one."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or (module is not None and is_frozen_norm(module))


def is_depthwise(module: nn.Module) -> bool:
    """Whether Torch-Pruning treats ``module`` as depthwise (each channel its own group)."""
    return isinstance(module, CONV) and module.groups == module.out_channels > 1


def batch_size(example_inputs: Any) -> int:
    """First dimension of the first tensor in ``example_inputs`` (tensor, sequence or dict).

    Raises:
        TypeError: if there is no tensor with at least one dimension.
    """
    values: Iterable[Any] = ()
    if isinstance(example_inputs, Mapping):
        values = example_inputs.values()
    elif isinstance(example_inputs, (Tensor, tuple, list)):
        values = [example_inputs] if isinstance(example_inputs, Tensor) else example_inputs
    count = sample_count(values)
    if count is not None:
        return count
    raise TypeError(
        f"example_inputs of type {type(example_inputs).__name__} hold no batched tensor; pass a tensor, "
        "a tuple of positional arguments or a dict of keyword arguments, batch dimension first"
    )


def _outputs(value: Any) -> list[Tensor]:
    """The tensors among what a network returns."""
    found = tensors_in(value)
    if not found:
        raise TypeError(f"the network returns no tensor, but {type(value).__name__}; give output_transform")
    return found


def _first_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        return next((t for t in map(_first_tensor, value) if t is not None), None)
    return None


def _call_macs(module: nn.Module, x: Tensor, out: Tensor) -> int:
    if isinstance(module, CONV):
        per_position = module.weight[0].numel()
        return per_position * (x.numel() if module.transposed else out.numel())
    if isinstance(module, nn.Linear):
        return out.numel() * module.in_features
    return 0


def _attention_macs(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """The four projections, which run inside one functional call; QKᵀ and AV are not counted (docs: limits)."""
    return (2 * query.numel() + key.numel() + value.numel()) * module.embed_dim


class _Recorder:
    """Forward hooks that write down every call of every leaf module (and attention), and what functions cost."""

    def __init__(self, model: nn.Module):
        self.calls: list[Call] = []
        self._operations, self._called = Operations(model), dict[str, nn.Module]()
        self._handles = []
        for name, module in model.named_modules():
            if isinstance(module, COUNTED):
                self._handles.append(module.register_forward_pre_hook(self._enter, prepend=True))
                self._handles.append(module.register_forward_hook(self._leave, always_call=True))
            elif module._parameters and not module._modules:
                self._handles.append(module.register_forward_pre_hook(partial(self._meet, name)))
            if isinstance(module, COUNTED) or not any(True for _ in module.children()):
                self._handles.append(module.register_forward_hook(self._hook(name), with_kwargs=True))

    def run(self, model: nn.Module, inputs: Any, forward_fn: Callable[[nn.Module, Any], Any] | None) -> Any:
        """Run the model and look at the functions that it calls."""
        with self._operations:
            return (forward_fn or call_model)(model, inputs)

    def functional(self, n: int) -> tuple[dict[str, int], dict[str, str]]:
        """Multiply-accumulates of functions per parameter, and reasons for what is not counted."""
        self._operations.finish(self._called)
        macs, uncounted = dict(self._operations.macs), dict(self._operations.uncounted)
        for name in [name for name, count in macs.items() if count % n]:
            uncounted[name.rpartition(".")[0] or name] = f"the operations on {name} do not grow with the batch"
            del macs[name]
        return macs, uncounted

    def _enter(self, *_: Any) -> None:
        self._operations.inside += 1

    def _leave(self, *_: Any) -> None:
        self._operations.inside -= 1

    def _meet(self, name: str, module: nn.Module, *_: Any) -> None:
        if not self._operations.inside:
            self._called[name] = module

    def _hook(self, name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            x, out = _first_tensor((args, kwargs)), _first_tensor(output)
            if x is not None and out is not None:
                attends = isinstance(module, nn.MultiheadAttention)
                macs = _attention_macs(module, *args, **kwargs) if attends else _call_macs(module, x, out)
                self.calls.append(Call(name, tuple(x.shape), tuple(out.shape), macs))

        return record

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


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
        recorder = _Recorder(model)
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


def count_ops(
    model: nn.Module, example_inputs: Any, *, forward_fn: Callable[[nn.Module, Any], Any] | None = None
) -> tuple[int, int]:
    """Count what one sample costs, by running the model.

    MACs are multiply-accumulates of data with parameters: of convolutions, linear layers and the projections of
    ``nn.MultiheadAttention``, of recurrent and bilinear layers, deformable convolutions, and of functions as
    ``F.conv2d(x, self.weight)``, ``x @ self.weight`` or ``torch.einsum`` with two operands. Bias, normalisation,
    activations and products of data with data (QKᵀ) are not counted; nor are kernels of other libraries, see
    :attr:`Trace.uncounted`. A module called twice costs its MACs twice and its parameters once.

    Args:
        model: the network.
        example_inputs: as for :func:`trace`; the batch dimension is divided out.
        forward_fn: ``forward_fn(model, example_inputs)``; default calls the model.

    Returns:
        ``(macs, params)``: MACs per sample and the number of parameters.

    Raises:
        TypeError: if the model is none, or compiled: compiled code hides its layers.

    Example:
        >>> count_ops(nn.Linear(10, 5), torch.zeros(4, 10))
        (50, 55)
    """
    checked_model(model)
    n = batch_size(example_inputs)
    with untouched(model), torch.no_grad():
        model.eval()
        recorder = _Recorder(model)
        try:
            recorder.run(model, fresh_inputs(example_inputs), forward_fn)
        finally:
            recorder.remove()
    macs = sum(call.macs for call in recorder.calls) + sum(recorder.functional(n)[0].values())
    return _per_sample(macs, n), sum(math.prod(p.shape) for p in model.parameters())


def _per_sample(macs: int, n: int) -> int:
    if macs % n:
        raise ValueError(
            f"{macs} MACs do not divide by the batch of {n}: the first dimension of example_inputs is not the batch"
        )
    return macs // n
