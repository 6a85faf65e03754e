"""Physically smaller networks from NNI's masks: a safe way to call ``ModelSpeedup`` of NNI 3.0.

NNI rewrites the model while it infers which channels are dead: it overwrites parameters with random numbers, draws
from the global generator, puts new modules in train mode, edits the masks, prints, and stops halfway on errors. All
of that happens to a copy here. Only when the copy runs and has the widths that the masks ask for are the smaller
tensors put into the model.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import logging
import warnings
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from tp_importance.core.arguments import checked_model
from tp_importance.core.copies import copy_memo
from tp_importance.core.guards import HOOKS, transaction
from tp_importance.core.progress import phase
from tp_importance.core.stale_optimizers import replacing
from tp_importance.graph.reparametrised import computed_tensors
from tp_importance.methods.resconv import resconv_layers

from ._compat import import_nni, legacy_tracer_shim
from .layers import remove_masked_layers

__all__ = ["checked_masks", "speedup"]

Masks = Mapping[str, Mapping[str, Tensor | None]]

WIDTHS = (
    *("in_channels", "out_channels", "groups", "num_features", "in_features", "out_features"),
    *("num_channels", "num_groups", "num_parameters", "normalized_shape", "embedding_dim"),
)
"""Module attributes that may follow the width of a tensor; anything else NNI changes would change the function."""

TOLERANCE = 1e-3
"""Largest silent difference between masked and sped-up output, relative to the largest output (float32)."""

AS_RETURNED = "pass the dict returned by compress() of an NNI pruner, {module name: {parameter name: tensor or None}}"
OTHER_ENGINE = (
    "Remedy: prune with Torch-Pruning, whose graph surgery handles more architectures. The model is unchanged."
)


def speedup(model: nn.Module, example_inputs: Any, masks: Masks, *, compat_shim: bool = False) -> nn.Module:
    """Remove the masked channels from the network, in place.

    A mask ``M`` of a parameter ``W`` keeps row ``c`` if any ``M[c, …] = 1``; with the masks of all coupled layers in
    agreement, the layer is left with ``|{c : M[c, …] ≠ 0}|`` of its channels, consumers lose the matching inputs, and
    batch norms and depthwise convolutions follow. The result computes what the masked model computed if the batch
    norm (and bias) of a removed channel is masked as well (``align`` in NNI's config_list); otherwise the masked
    model still has a constant ``β − γμ/σ`` there, and a warning says by how much the outputs differ (as an error, by
    ``warnings.simplefilter("error")``, it leaves the model unchanged).

    In a network of :class:`nni_plugins.ResConvPruner` whole layers go, which ``ModelSpeedup`` cannot do: every
    residual convolution whose mask of s is 0 is removed, its factor a folded into its neighbours, and the others are
    fused. Such a network does not lose channels at the same time: prune those of the plain one that is left.

    Modules stay the same objects with their hooks and train or eval mode. Parameters that shrink are new objects,
    ``requires_grad`` as before, without gradient: build the optimizer afterwards. Works on frozen models and under
    ``torch.no_grad()``. On any error the model is unchanged. Global random state, ``masks`` and ``example_inputs``
    are left alone.

    Args:
        model: the network that was pruned, after ``pruner.unwrap_model()``.
        example_inputs: tensor, tuple or list of positional arguments, or dict of keyword arguments; first dimension
            of every tensor is the batch. Arguments without tensors are fixed at their value.
        masks: ``{module name: {parameter name: mask or None}}`` as returned by ``compress()`` of an NNI pruner; a
            mask of zeros and ones has the parameter's shape or 1 in broadcast dimensions, e.g. ``C × 1 × 1 × 1``.
            For layers, ``{layer: {"s": mask of shape (1,)}}``.
        compat_shim: trace with NNI's concrete tracer under :func:`~nni_plugins._compat.legacy_tracer_shim`, for
            networks whose control flow ``torch.fx`` cannot trace. The branches taken on ``example_inputs`` are
            assumed. NNI 3.0 only. Removing layers needs no such trace and takes no notice.

    Returns:
        ``model`` itself, smaller.

    Raises:
        NNIUnavailableError: NNI cannot be imported.
        TypeError: ``example_inputs`` do not fit the signature of the model's ``forward``, ``masks`` are not a dict of
            dicts of tensors, or the model is compiled or wrapped (``DistributedDataParallel``, ...).
        ValueError: the masks are empty or remove nothing, name an unknown module or parameter, have a wrong shape,
            are not made of zeros and ones, are not structured, remove a whole layer, or contradict each other.
        RuntimeError: the model still holds NNI wrappers, cannot be traced, or NNI fails or leaves other widths than
            the masks ask for.

    Example:
        >>> model, masks = pruner.compress()  # doctest: +SKIP
        >>> pruner.unwrap_model()  # doctest: +SKIP
        >>> speedup(model, torch.randn(2, 3, 32, 32), masks)  # doctest: +SKIP

    Source: ``nni/compression/speedup/model_speedup.py`` of NNI 3.0.
    """
    wrapped = next((n for n, _ in checked_model(model).named_modules() if n.split(".")[-1] == "_nni_wrapper"), None)
    if wrapped is not None:
        raise RuntimeError(f"the model is still wrapped by NNI, at {wrapped!r}; call pruner.unwrap_model() first")
    if resconv_layers(model):
        with phase("removing layers"), replacing(model):
            return remove_masked_layers(model, example_inputs, _as_masks(masks))
    full_masks = checked_masks(model, masks)
    with phase("removing channels"), torch.inference_mode(False), torch.enable_grad(), _isolated(model):
        inputs = _bind(model, example_inputs)
        trial = _trial_copy(model)
        _apply(trial, full_masks)
        before = _run(trial, inputs)
        try:
            replaced = _shrink(trial, inputs, full_masks, compat_shim)
        except RuntimeError as error:
            found = [c.reason(name) for name, module in model.named_modules() for c in computed_tensors(module)]
            if not found:
                raise
            raise RuntimeError(f"{error} NNI knows parameters only: {'; '.join(found)}") from error
        _check_widths(trial, full_masks)
        _compare(before, _run(trial, inputs))
        changes = _changes(model, trial, replaced)
    step = transaction(model)
    with step, replacing(model):
        step.commit()
        for module, attributes, parameters, buffers in changes:
            vars(module).update(attributes)
            module._parameters.update(parameters)
            module._buffers.update(buffers)
    return model


# -- masks


def _as_masks(masks: Any) -> Masks:
    if not isinstance(masks, Mapping):
        raise TypeError(f"masks are of type {type(masks).__name__}; {AS_RETURNED}")
    for name, targets in masks.items():
        if not isinstance(targets, Mapping):
            raise TypeError(f"the masks of {name!r} are of type {type(targets).__name__}; {AS_RETURNED}")
    return masks


def checked_masks(model: nn.Module, masks: Masks) -> dict[str, dict[str, Tensor]]:
    """Own copies of the masks, expanded to full shape, without the empty ones; errors as :func:`speedup`."""
    modules = dict(model.named_modules(remove_duplicate=False))
    checked: dict[str, dict[str, Tensor]] = {}
    for name, targets in _as_masks(masks).items():
        if name not in modules:
            raise ValueError(
                f"masks name a module {name!r} that the model does not have; pass the model they were made on"
            )
        parameters = dict(modules[name].named_parameters(recurse=False))
        full = {
            target: _checked_mask(f"{name}.{target}", mask, parameters.get(target))
            for target, mask in targets.items()
            if mask is not None and not _is_idle(mask, modules[name], target)
        }
        if full:
            checked[name] = full
            _check_agreement(name, modules[name], full)
    if not any(bool((mask == 0).any()) for targets in checked.values() for mask in targets.values()):
        raise ValueError(
            f"the masks of {len(masks)} modules remove nothing; call pruner.compress() with a higher sparse_ratio"
        )
    return checked


def _is_idle(mask: Any, module: nn.Module, target: str) -> bool:
    """Whether a mask is for a parameter that is ``None``, or leaves a tensor that is none as it is."""
    if target in module._parameters:
        return module._parameters[target] is None
    return isinstance(mask, Tensor) and isinstance(getattr(module, target, None), Tensor) and bool((mask == 1).all())


def _checked_mask(name: str, mask: Tensor, parameter: Tensor | None) -> Tensor:
    if parameter is None:
        raise ValueError(f"there is no parameter {name!r} to mask; only parameters (weight, bias) can be removed")
    if not isinstance(mask, Tensor):
        raise TypeError(f"the mask of {name!r} is of type {type(mask).__name__}; {AS_RETURNED}")
    shape = tuple(parameter.shape)
    if mask.dim() != len(shape) or any(m not in (1, s) for m, s in zip(mask.shape, shape, strict=True)):
        raise ValueError(
            f"the mask of {name!r} has shape {tuple(mask.shape)}, the parameter {shape}; pass masks of the unpruned "
            "model, of the parameter's shape or with 1 in broadcast dimensions"
        )
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(f"the mask of {name!r} has values other than 0 and 1; threshold it first")
    full = mask.detach().to(parameter.device, torch.float32).expand(shape).clone()
    kept = _kept(full)
    for dim, keep in enumerate(kept):
        if not bool(keep.any()):
            raise ValueError(
                f"the mask of {name!r} removes all {shape[dim]} channels; a layer must keep at least one, as "
                "ModelSpeedup cannot remove it (EmptyLayerError). nni_plugins.ResConvPruner removes layers"
            )
    outer = torch.ones((), device=full.device)
    for dim, keep in enumerate(kept):
        outer = outer * keep.float().reshape([-1 if d == dim else 1 for d in range(full.dim())])
    if not torch.equal(full, outer.expand(shape)):
        raise ValueError(
            f"the mask of {name!r} (shape {shape}) is unstructured: it zeroes single weights, which cannot be removed; "
            "prune whole output channels (granularity 'default' or 'out_channel', not LevelPruner)"
        )
    return full


def _kept(mask: Tensor) -> list[Tensor]:
    """Which rows, and for matrices and kernels which columns, a mask keeps: boolean vectors."""
    dims = range(min(mask.dim(), 2))
    return [mask.transpose(0, dim).flatten(1).any(1) if mask.dim() > 1 else mask.bool() for dim in dims]


def _check_agreement(name: str, module: nn.Module, masks: Mapping[str, Tensor]) -> None:
    weight, bias = masks.get("weight"), masks.get("bias")
    if weight is None or bias is None or getattr(module, "transposed", False):
        return
    rows = _kept(weight)[0]
    if not torch.equal(rows, bias.bool()):
        raise ValueError(
            f"the masks of {name!r} contradict each other: weight keeps {int(rows.sum())}, bias {int(bias.sum())} of "
            f"{len(bias)} channels, or not the same; align the bias to the weight in config_list"
        )


def _apply(trial: nn.Module, masks: Mapping[str, Mapping[str, Tensor]]) -> None:
    with torch.no_grad():
        for name, targets in masks.items():
            for target, mask in targets.items():
                trial.get_submodule(name)._parameters[target].mul_(mask)  # type: ignore[union-attr]


# -- the trial


@contextlib.contextmanager
def _isolated(model: nn.Module) -> Iterator[None]:
    """Fixed random numbers, silence, and NNI's new modules in the working precision; all undone on exit."""
    logger = logging.getLogger("nni.compression.speedup")
    level, dtype = logger.level, torch.get_default_dtype()
    with torch.random.fork_rng(range(torch.cuda.device_count())), contextlib.redirect_stdout(io.StringIO()):
        try:
            torch.manual_seed(0)
            logger.setLevel(logging.CRITICAL)
            torch.set_default_dtype(_precision(model))
            yield
        finally:
            logger.setLevel(level)
            torch.set_default_dtype(dtype)


def _precision(model: nn.Module) -> torch.dtype:
    """Float64 if the model has any, else float32: NNI knows no bfloat16, and widening loses nothing."""
    return torch.float64 if any(p.dtype == torch.float64 for p in model.parameters()) else torch.float32


def _trial_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode, in the working precision and without hooks."""
    no_hooks: dict[int, Any] = {id(getattr(m, key)): OrderedDict() for m in model.modules() for key in HOOKS}
    try:
        return copy.deepcopy(model, copy_memo(model) | no_hooks).to(_precision(model)).eval()
    except Exception as error:
        raise RuntimeError(
            f"cannot copy {type(model).__name__} to try the removal on: {type(error).__name__}: {error}. Take out "
            "reparametrisations (weight norm, torch.nn.utils.prune) and cached tensors first"
        ) from error


def _bind(model: nn.Module, example_inputs: Any) -> inspect.BoundArguments:
    """Copies of the example inputs under the names of ``forward``'s parameters, defaults filled in."""
    args = (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs
    if not isinstance(args, (tuple, list, Mapping)):
        raise TypeError(
            f"example_inputs are of type {type(args).__name__}; pass a tensor, a tuple of positional or a dict of "
            "keyword arguments"
        )
    signature, precision = inspect.signature(model.forward), _precision(model)
    try:
        bound = signature.bind(**args) if isinstance(args, Mapping) else signature.bind(*args)
    except TypeError as error:
        raise TypeError(f"example_inputs do not fit {type(model).__name__}.forward{signature}: {error}") from error
    bound.apply_defaults()
    for name, value in bound.arguments.items():
        bound.arguments[name] = tree_map(
            lambda x: (
                x.detach().clone().to(precision if x.is_floating_point() else x.dtype) if isinstance(x, Tensor) else x
            ),
            value,
        )
    return bound


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _run(trial: nn.Module, inputs: inspect.BoundArguments) -> list[Tensor]:
    args, kwargs = copy.deepcopy((inputs.args, inputs.kwargs))  # a network may write into them
    try:
        with torch.no_grad():
            return _tensors(trial(*args, **kwargs))
    except Exception as error:
        raise RuntimeError(
            f"{type(trial).__name__} does not run on the example inputs, masked or with the channels removed: "
            f"{type(error).__name__}: {error}. If it runs unmasked, an operation with fixed sizes or a raw parameter "
            f"does not follow the masks. {OTHER_ENGINE}"
        ) from error


class _Tracer(torch.fx.Tracer):
    """Symbolic tracing in which arguments without tensors keep their value."""

    def __init__(self, inputs: inspect.BoundArguments) -> None:
        super().__init__()
        self.inputs = inputs

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        bound = copy.copy(self.inputs)
        bound.arguments = {
            name: self.create_proxy("placeholder", name, (), {}) if _tensors(value) else value
            for name, value in self.inputs.arguments.items()
        }
        return lambda root: root_fn(root, *bound.args, **bound.kwargs), [self.root]


def _shrink(trial: nn.Module, inputs: inspect.BoundArguments, masks: Any, compat_shim: bool) -> list[str]:
    """Run ``ModelSpeedup`` on the trial; the names of the modules it replaced."""
    engine = import_nni("nni.compression.speedup").ModelSpeedup
    modules = dict(trial.named_modules())
    silent = logging.Logger("nni", logging.CRITICAL + 1)
    masks = copy.deepcopy(masks)  # NNI edits them
    with legacy_tracer_shim() if compat_shim else contextlib.nullcontext():
        try:
            if compat_shim:
                dummy, graph_module = inputs.args, None
            else:
                dummy = tuple(value for value in inputs.arguments.values() if _tensors(value))
                graph_module = torch.fx.GraphModule(trial, _Tracer(inputs).trace(trial))
            run = engine(trial, copy.deepcopy(dummy), masks, graph_module=graph_module, logger=silent)
            called = {node.target for node in run.graph_module.graph.nodes if node.op == "call_module"}
        except Exception as error:
            raise RuntimeError(
                f"cannot trace {type(trial).__name__}: {type(error).__name__}: {error}. "
                + ("" if compat_shim else "If its control flow depends on tensors, try compat_shim=True. ")
                + OTHER_ENGINE
            ) from error
    unused = sorted(masks.keys() - called)
    if unused:
        raise RuntimeError(
            f"the forward pass does not call {unused} on the example inputs, so their masks cannot be removed; name "
            f"the layers by their first name in model.named_modules(), and leave out unused ones. {OTHER_ENGINE}"
        )
    # NNI's own test, "more values than samples", loses layers with a single output
    run.tensor_propagate_check = lambda t: t.numel() >= run.batch_size and t.numel() % run.batch_size == 0
    for info in run.node_infos.values():
        info._output_randomize = None  # the name under which NNI forgets values read last by .size() or .dim()
    try:
        run.speedup_model()
    except Exception as error:
        raise RuntimeError(
            f"NNI's ModelSpeedup failed at {_layer_at_fault(error)}: {type(error).__name__}: {error}. {OTHER_ENGINE}"
        ) from error
    trial.eval()  # NNI's new modules are in train mode
    return [name for name, module in modules.items() if trial.get_submodule(name) is not module]


def _layer_at_fault(error: Exception) -> str:
    """The graph node that NNI was working on: its errors name none."""
    layer, traceback = "an unknown layer", error.__traceback__
    while traceback is not None:
        node = traceback.tb_frame.f_locals.get("node")
        if isinstance(node, torch.fx.Node):
            layer = f"{node.op} {node.target!r}"
        traceback = traceback.tb_next
    return layer


# -- the result


def _check_widths(trial: nn.Module, masks: Mapping[str, Mapping[str, Tensor]]) -> None:
    for name, targets in masks.items():
        for target, mask in targets.items():
            shape = tuple(getattr(trial.get_submodule(name), target, torch.empty(0)).shape)
            for dim, keep in enumerate(_kept(mask)):
                wanted, left = int(keep.sum()), shape[dim] if dim < len(shape) else 0
                if wanted < len(keep) and left != wanted:
                    raise RuntimeError(
                        f"NNI left {left} of {len(keep)} channels in dimension {dim} of '{name}.{target}', the masks "
                        f"keep {wanted}. Usual causes: layers that share channels have different masks or none (sums, "
                        "products with a gate, depthwise and grouped convolutions; dependency_group_id sets them), a "
                        "batch norm is masked but not the layer before it, or NNI cannot shrink a "
                        f"{type(trial.get_submodule(name)).__name__}. {OTHER_ENGINE}"
                    )


def _compare(before: list[Tensor], after: list[Tensor]) -> None:
    """The masked and the smaller network must agree; a difference in value may be the user's choice."""
    shapes = [[tuple(x.shape) for x in tensors] for tensors in (before, after)]
    if shapes[0] != shapes[1]:
        raise RuntimeError(
            f"the network's output changed from shapes {shapes[0]} to {shapes[1]}: the masks remove outputs of the "
            "network; exclude its last layer in config_list (exclude_op_names). The model is unchanged."
        )
    for masked, small in zip(before, after, strict=True):
        if not masked.numel():
            continue
        masked, small = masked.double(), small.double()
        scale, error = float(masked.abs().max()), float((masked - small).abs().max())
        if not error <= TOLERANCE * scale:
            warnings.warn(
                f"masked and sped-up network differ by {error:.2g} on a scale of {scale:.2g}: align the masks of batch "
                "norms and biases with their convolution (align in config_list), or an operation lies in between for "
                "which removing a channel is not zeroing it (group norm, channel shuffle, sigmoid)",
                stacklevel=3,
            )


def _changes(
    model: nn.Module, trial: nn.Module, replaced: list[str]
) -> list[tuple[nn.Module, dict[str, Any], dict[str, Any], dict[str, Any]]]:
    """Attributes, parameters and buffers to set on the replaced modules, for the widths they have in the trial."""
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    changes = []
    for name in replaced:
        old, new = model.get_submodule(name), trial.get_submodule(name)
        attributes = {k: v for k, v in vars(new).items() if k[0] != "_" and getattr(old, k, None) != v}
        attributes.pop("training", None)
        parameters = _resized(name, old._parameters, new._parameters)
        shared = [k for k in parameters if owners[id(old._parameters[k])] > 1]
        if type(old) is not type(new) or not attributes.keys() <= set(WIDTHS) or shared:
            raise RuntimeError(
                f"NNI turned {name!r} from {old} into {new}, which changes more than its width or breaks up shared "
                f"parameters {shared}. {OTHER_ENGINE}"
            )
        changes.append((old, attributes, parameters, _resized(name, old._buffers, new._buffers)))
    return changes


def _resized(name: str, old: Mapping[str, Tensor | None], new: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Tensors of another shape, in the precision, kind and ``requires_grad`` of the old ones."""
    if {k for k, v in old.items() if v is not None} != {k for k, v in new.items() if v is not None}:
        raise RuntimeError(f"NNI turned the tensors {sorted(old)} of {name!r} into {sorted(new)}. {OTHER_ENGINE}")
    resized: dict[str, Tensor] = {}
    for key, before in old.items():
        after = new[key]
        if before is None or after is None or before.shape == after.shape:
            continue
        value = after.detach().to(before.dtype)
        resized[key] = nn.Parameter(value, before.requires_grad) if isinstance(before, nn.Parameter) else value
    return resized
