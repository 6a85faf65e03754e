"""Run a network on a batch or on example inputs, and say what may be wrong when that fails."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .batches import likely_keys, split_batch, tensors_in
from .devices import misplaced, reference_tensor, to_model

__all__ = ["ForwardFn", "call_model", "fresh_inputs", "layer_input", "run_batch", "run_model", "with_input"]

ForwardFn = Callable[[nn.Module, Any], Any]
"""``forward_fn(model, batch)``: runs the model on a batch exactly as the loader gave it."""


def run_batch(model: nn.Module, batch: Any, forward_fn: ForwardFn | None = None) -> Any:
    """Run ``model`` on one batch of a loader; gradients and modes are the caller's business.

    What the model raises on inputs that do not fit stays what it is, and gets a note with their shapes.

    Args:
        model: the network.
        batch: see :func:`split_batch`; the labels are dropped, the rest is moved by :func:`to_model`. The network
            gets clones, so that it may write into its inputs.
        forward_fn: replaces all that: ``forward_fn(model, batch)`` gets the batch as the loader gave it, cloned.

    Returns:
        The output of the model (or of ``forward_fn``).

    Raises:
        TypeError: if the batch has an unknown form.
        ValueError: if the batch is empty.
    """
    batch = fresh_inputs(batch)
    if forward_fn is not None:
        return forward_fn(model, batch)
    args, kwargs, _ = split_batch(batch)
    like = reference_tensor(model)
    args, kwargs = to_model(like, args), to_model(like, kwargs)
    try:
        return model(*args, **kwargs)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        _explain(error, batch)
        raise


def fresh_inputs(value: Any) -> Any:
    """``value`` with all tensors cloned: a network may write into them, and autograd refuses those of inference mode.

    Args:
        value: tensor or nested tuples (named ones too), lists and dicts of tensors; anything else stays itself.

    Returns:
        The same structure. A tensor that stands in it twice is cloned once; ``requires_grad`` is kept.

    Example:
        >>> import torch
        >>> x = torch.zeros(2)
        >>> _ = fresh_inputs({"x": x})["x"].fill_(1.0)
        >>> x.tolist()
        [0.0, 0.0]
    """
    clones: dict[int, Tensor] = {}

    def fresh(item: Any) -> Any:
        if isinstance(item, Tensor):
            if id(item) not in clones:
                clones[id(item)] = item.detach().clone().requires_grad_(item.requires_grad)
            return clones[id(item)]
        if isinstance(item, MutableMapping) and not isinstance(item, dict):  # a batch encoding of a tokenizer, say
            twin = copy.copy(item)
            twin.update({key: tree_map(fresh, entry) for key, entry in item.items()})
            return twin
        return item

    return tree_map(fresh, value)


def layer_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a layer was called with: its first argument, the keyword ``input`` of torch's layers, or the first one."""
    return args[0] if args else kwargs[_input_key(kwargs)]


def _input_key(kwargs: Mapping[str, Any]) -> str:
    return "input" if "input" in kwargs else next(iter(kwargs))


def call_model(model: nn.Module, example_inputs: Any) -> Any:
    """Call ``model`` on example inputs; unlike a batch, they hold no labels and are not moved.

    Args:
        model: the network.
        example_inputs: tensor, tuple or list of positional arguments, or dict of keyword arguments.

    Returns:
        The output of the model.

    Raises:
        TypeError: if ``example_inputs`` is none of these.
    """
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example_inputs, Tensor):
        args = (example_inputs,)
    elif isinstance(example_inputs, Mapping):
        kwargs = dict(example_inputs)
    elif isinstance(example_inputs, (tuple, list)):
        args = tuple(example_inputs)
    else:
        raise TypeError(
            f"example_inputs are of type {type(example_inputs).__name__}; pass a tensor, a tuple of positional or a "
            "dict of keyword arguments"
        )
    try:
        return model(*args, **kwargs)
    except RuntimeError as error:
        if (reason := misplaced(model, example_inputs)) and not getattr(error, "__notes__", ()):
            error.add_note(reason)
        raise


def run_model(model: nn.Module, example_inputs: Any, forward_fn: ForwardFn | None = None) -> Any:
    """Run ``model`` on clones of the example inputs, by ``forward_fn`` if there is one, else by :func:`call_model`.

    Args:
        model: the network.
        example_inputs: as for :func:`call_model`.
        forward_fn: ``forward_fn(model, example_inputs)``.

    Returns:
        The output.
    """
    return (forward_fn or call_model)(model, fresh_inputs(example_inputs))


def _explain(error: Exception, batch: Any) -> None:
    """Note on what the model was called; not on our own errors, which hooks raise on the way."""
    frames = error.__traceback__
    while frames is not None and frames.tb_next is not None:
        frames = frames.tb_next
    frame = None if frames is None else frames.tb_frame
    if frame is not None and frame.f_code.co_name != "__torch_function__":  # there torch runs below us
        if str(frame.f_globals.get("__name__")).split(".")[0] in ("tp_importance", "nni_plugins"):
            return
    if getattr(error, "__notes__", ()):
        return
    if isinstance(error, TypeError) and (how := _called_by_keyword(batch)):
        error.add_note(how)
        return
    shapes = [f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in tensors_in(batch)]
    error.add_note(
        f"the model was run on a batch of the loader with tensors of shape {', '.join(shapes) or 'none'}. If that is "
        "the cause: inputs must be like example_inputs, batch dimension first: DataLoader(dataset, batch_size=64), or "
        "[(X, Y)] for tensors of all samples"
    )


def _called_by_keyword(batch: Any) -> str:
    """What a dict for a batch means, and how to say that it means something else."""
    inner = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(inner, Mapping):
        return ""
    _, kwargs, labels = split_batch(batch)
    first, target = likely_keys(kwargs)
    at = "batch" if inner is batch else "batch[0]"
    label_fn = "" if labels is not None else f". Where labels are needed, pass label_fn=lambda batch: {at}[{target!r}]"
    return (
        f"the loader gives dicts, so the model was called with the keyword arguments {', '.join(kwargs) or '(none)'}. "
        f"If its forward takes others, pass forward_fn=lambda model, batch: model({at}[{first!r}]); forward_fn gets "
        f"example_inputs, too, so give these as the loader gives its batches{label_fn}"
    )


def with_input(args: tuple[Any, ...], kwargs: Mapping[str, Any], x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a layer with ``x`` in place of its first one."""
    return ((x, *args[1:]), dict(kwargs)) if args else ((), {**kwargs, _input_key(kwargs): x})
