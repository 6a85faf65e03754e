"""One reading of batches: what goes into the network, what the labels are, on which device and in which dtype."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import is_dataclass
from itertools import chain, cycle
from numbers import Number
from operator import length_hint
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from torch.utils.data import Dataset, TensorDataset

from .processes import warn_of_processes

__all__ = [
    "ForwardFn",
    "WholeBatches",
    "call_model",
    "check_loader",
    "fresh_inputs",
    "iterate",
    "keyed_labels",
    "layer_input",
    "misplaced",
    "reference_tensor",
    "require_reiterable",
    "run_batch",
    "run_model",
    "single_label",
    "split_batch",
    "tensors_in",
    "to_model",
]

ForwardFn = Callable[[nn.Module, Any], Any]
"""``forward_fn(model, batch)``: runs the model on a batch exactly as the loader gave it."""

LABEL_KEYS = ("labels", "label")

_ONE_WAY = ("builtins", "itertools", "torch.utils.data.dataloader")
"""Where iterators come from that end for good."""


def split_batch(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], Tensor | None]:
    """Split one batch of a loader into the arguments of the model and the labels.

    ===============================  ==================  =============  =====================
    ``batch``                        ``args``            ``kwargs``     ``labels``
    ===============================  ==================  =============  =====================
    tensor ``x``                     ``(x,)``            ``{}``         ``None``
    ``(x,)``, ``(x, y, ...)``        ``(x,)``            ``{}``         ``y`` if a tensor
    ``((x1, x2), y)``                ``(x1, x2)``        ``{}``         ``y`` if a tensor
    ``({"a": x}, y)``                ``()``              ``{"a": x}``   ``y`` if a tensor
    ``{"a": x, "labels": y}``        ``()``              ``{"a": x}``   ``y`` if a tensor
    ===============================  ==================  =============  =====================

    Lists count as tuples; ``"label"`` is read where ``"labels"`` is missing, and neither goes to the model.

    Args:
        batch: what the loader yields; tensors have the batch dimension first.

    Returns:
        ``(args, kwargs, labels)``, to be called as ``model(*args, **kwargs)``.

    Raises:
        TypeError: if the batch, or its first item, has none of these forms.
        ValueError: if the batch is an empty tuple, list or dict.

    Example:
        >>> import torch
        >>> args, kwargs, labels = split_batch({"pixels": torch.zeros(2, 3), "labels": torch.tensor([0, 1])})
        >>> args, list(kwargs), labels.tolist()
        ((), ['pixels'], [0, 1])
    """
    if isinstance(batch, Tensor):
        return (batch,), {}, None
    if isinstance(batch, (tuple, list, Mapping)) and not len(batch):
        raise ValueError(f"the loader gave an empty {type(batch).__name__} for a batch; give x, (x, y) or a dict")
    if isinstance(batch, Mapping):
        return _split_mapping(batch)
    if not isinstance(batch, (tuple, list)):
        raise TypeError(
            f"the loader gave a batch of type {type(batch).__name__}; give a tensor x, a tuple (x, y) or a dict of "
            "keyword arguments, or pass forward_fn"
        )
    first, labels = batch[0], batch[1] if len(batch) > 1 and isinstance(batch[1], Tensor) else None
    if isinstance(first, Tensor):
        return (first,), {}, labels
    if isinstance(first, Mapping):
        _, kwargs, own = _split_mapping(first)
        return (), kwargs, own if labels is None else labels
    if isinstance(first, (tuple, list)):
        return tuple(first), {}, labels
    raise TypeError(
        f"the first item of a batch is the input of the model, here of type {type(first).__name__}; make it a tensor, "
        "a tuple of positional or a dict of keyword arguments, or pass forward_fn"
    )


def _split_mapping(batch: Mapping[Any, Any]) -> tuple[tuple[Any, ...], dict[str, Any], Tensor | None]:
    kwargs = dict(batch)
    for key in kwargs:
        if not isinstance(key, str):
            raise TypeError(f"a dict batch holds keyword arguments, but its key {key!r} is not a string")
    found = [kwargs.pop(key) for key in LABEL_KEYS if key in kwargs]
    return (), kwargs, found[0] if found and isinstance(found[0], Tensor) else None


def reference_tensor(model: nn.Module) -> Tensor | None:
    """The tensor whose device and dtype inputs of ``model`` must have.

    Args:
        model: any module.

    Returns:
        The first floating parameter, else the first floating buffer, else the first parameter or buffer, else ``None``.
    """
    fallback = None
    for tensor in chain(model.parameters(), model.buffers()):
        if tensor.is_floating_point():
            return tensor
        fallback = tensor if fallback is None else fallback
    return fallback


def to_model(model: nn.Module | Tensor | None, obj: Any) -> Any:
    """Move tensors to the device of the model, floating ones also to its floating dtype.

    Args:
        model: the model, or a tensor to follow instead (``None``: leave ``obj`` as it is).
        obj: tensor or nested tuples (named ones too), lists and dicts of tensors; anything else stays itself.

    Returns:
        The same structure; tensors that are already right are not copied.

    Example:
        >>> import torch
        >>> batch = to_model(nn.Linear(2, 2).half(), {"x": torch.zeros(1, 2), "ids": torch.tensor([3])})
        >>> batch["x"].dtype, batch["ids"].dtype
        (torch.float16, torch.int64)
    """
    like = reference_tensor(model) if isinstance(model, nn.Module) else model
    if like is None:
        return obj
    if isinstance(obj, Tensor):
        both_floating = obj.is_floating_point() and like.is_floating_point()
        return obj.to(device=like.device, dtype=like.dtype if both_floating else obj.dtype)
    if isinstance(obj, Mapping):
        return {key: to_model(like, value) for key, value in obj.items()}
    if isinstance(obj, tuple) and hasattr(obj, "_make"):
        return obj._make(to_model(like, item) for item in obj)
    if isinstance(obj, tuple):
        return tuple(to_model(like, item) for item in obj)
    if isinstance(obj, list):
        return [to_model(like, item) for item in obj]
    return obj


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
    """The first argument a layer was called with, by position or by keyword."""
    return args[0] if args else next(iter(kwargs.values()))


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


def misplaced(model: nn.Module, example_inputs: Any) -> str:
    """What a network that fails on its example inputs may suffer from: another device or precision, or a low one.

    Args:
        model: the network.
        example_inputs: what it failed on.

    Returns:
        The reason and the remedy, or nothing.

    Example:
        >>> import torch
        >>> misplaced(nn.Linear(2, 2).half(), torch.zeros(1, 2))
        'example_inputs are float32 and the weights float16: pass example_inputs.to(torch.float16), or model.float()'
    """
    like = reference_tensor(model)
    for tensor in [] if like is None else tensors_in(example_inputs):
        assert like is not None
        if tensor.device != like.device:
            return f"example_inputs are on {tensor.device} and the weights on {like.device}: bring them together"
        if tensor.is_floating_point() and like.is_floating_point() and tensor.dtype != like.dtype:
            names = [str(t.dtype).removeprefix("torch.") for t in (tensor, like)]
            return (
                f"example_inputs are {names[0]} and the weights {names[1]}: pass example_inputs.to({like.dtype}), or "
                "model.float()"
            )
    if like is not None and like.dtype in (torch.float16, torch.bfloat16):
        return f"the weights are {like.dtype}, which not every layer takes on every device: try model.float()"
    return ""


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in nested tuples, lists, dicts and data classes, in order."""
    found = list[Tensor]()
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif is_dataclass(leaf) or isinstance(leaf, SimpleNamespace):
            found += tensors_in(dict(vars(leaf)))
    return found


def iterate(loader: Iterable[Any]) -> Iterator[Any]:
    """Iterate over ``loader``, but not over what only looks like one.

    Args:
        loader: iterable of batches, with or without a length.

    Returns:
        Its iterator.

    Raises:
        TypeError: see :func:`check_loader`; and while iterating, if it is a data set that gives single samples.

    Warns:
        UserWarning: if ``torch.distributed`` runs several processes: each sees its own batches.

    Example:
        >>> import torch
        >>> len(list(iterate([torch.zeros(2, 3), torch.zeros(1, 3)])))
        2
    """
    check_loader(loader)
    warn_of_processes("batches")
    return _batches_of(loader) if isinstance(loader, Dataset) else iter(loader)


class WholeBatches:
    """A loader whose last batch, if it has too few samples by itself, comes as one with the batch before it.

    For statistics that are of a batch: the variance of one sample is none. Other small batches stay as they are, and
    so does a last one that cannot be joined (of another form, or with values that are no tensors).

    Args:
        loader: iterable of batches.
        least: samples that the last batch needs by itself.

    Attributes:
        given: batches that the loader has given in the last pass.

    Example:
        >>> import torch
        >>> [len(batch) for batch in WholeBatches([torch.zeros(4, 3), torch.zeros(4, 3), torch.zeros(1, 3)], 2)]
        [4, 5]
    """

    def __init__(self, loader: Iterable[Any], least: int) -> None:
        check_loader(loader)
        self._loader, self._least, self.given = loader, least, 0

    def __length_hint__(self) -> int:
        return length_hint(self._loader)

    def __iter__(self) -> Iterator[Any]:
        held: list[Any] = []  # a batch, and perhaps a short one behind it
        self.given = 0
        for batch in iterate(self._loader):
            self.given += 1
            if held and (len(held) == 2 or not self._short(batch)):
                yield from held
                held = []
            held.append(fresh_inputs(batch))  # the loader may use the memory again
        together = _joined(*held) if len(held) == 2 else None
        yield from held if together is None else [together]

    def _short(self, batch: Any) -> bool:
        sizes = [len(t) for t in tensors_in(batch) if t.dim()]
        return bool(sizes) and 0 < sizes[0] < self._least


def _joined(first: Any, second: Any) -> Any | None:
    """Two batches as one, or ``None`` if they do not fit together."""
    (a, form), (b, other) = tree_flatten(first), tree_flatten(second)
    if form != other or not all(isinstance(t, Tensor) and t.dim() for t in (*a, *b)):
        return None
    if len({len(t) for t in a}) != 1 or len({len(t) for t in b}) != 1:
        return None
    if any((x.shape[1:], x.dtype, x.device) != (y.shape[1:], y.dtype, y.device) for x, y in zip(a, b, strict=True)):
        return None
    return tree_unflatten([torch.cat(pair) for pair in zip(a, b, strict=True)], form)


def check_loader(loader: Any) -> None:
    """Refuse what cannot be an iterable of batches; nothing is read.

    Args:
        loader: what was given for one.

    Raises:
        TypeError: if it cannot be iterated over, is itself one batch (a tensor, a dict, a pair of inputs and labels),
            a ``TensorDataset``, which gives single samples, or an ``itertools.cycle``, which never ends.

    Example:
        >>> import torch
        >>> check_loader((torch.zeros(8, 3), torch.zeros(8, dtype=torch.int64)))
        Traceback (most recent call last):
        TypeError: loader is one pair of tensors of shapes (8, 3) and (8,), not an iterable of batches; pass [(X, Y)], \
or DataLoader(TensorDataset(X, Y), batch_size=64)
    """
    if isinstance(loader, (Tensor, Mapping)):
        remedy = ", or DataLoader(TensorDataset(X), batch_size=64)" if isinstance(loader, Tensor) else ""
        raise TypeError(f"loader is a single {type(loader).__name__}, not an iterable of batches; pass [batch]{remedy}")
    if isinstance(loader, TensorDataset):
        raise TypeError(_single_samples(loader))
    if isinstance(loader, cycle):
        raise TypeError(
            "loader is an itertools.cycle, which never ends; pass its first batches, "
            "list(itertools.islice(loader, 8)), or what it goes round in"
        )
    if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
        raise TypeError(
            f"loader of type {type(loader).__name__} cannot be iterated over; pass an iterable of batches, e.g. "
            "DataLoader(dataset, batch_size=64)"
        )
    if isinstance(loader, (tuple, list)) and len(loader) == 2 and all(isinstance(t, Tensor) for t in loader):
        x, y = loader
        if y.dim() == 1 < x.dim() and len(x) == len(y):  # two batches of inputs would have as many dimensions
            raise TypeError(
                f"loader is one pair of tensors of shapes {tuple(x.shape)} and {tuple(y.shape)}, not an iterable of "
                "batches; pass [(X, Y)], or DataLoader(TensorDataset(X, Y), batch_size=64)"
            )


def require_reiterable(loader: Any) -> None:
    """Refuse a generator, or another iterator of Python or torch, where the batches are needed more than once.

    Iterators of other libraries pass: some start again.

    Raises:
        TypeError: naming the remedy.
    """
    if isinstance(loader, Iterator) and type(loader).__module__ in _ONE_WAY:
        raise TypeError(
            f"loader is a {type(loader).__name__} and gives its batches only once, but several passes are needed; "
            "pass a list of batches, list(loader), or a DataLoader"
        )


def _batches_of(loader: Any) -> Iterator[Any]:
    """The items of a data set, unless the first is a single sample, as a scalar for a label tells."""
    for i, item in enumerate(loader):
        if i == 0 and single_label(item):
            raise TypeError(_single_samples(loader))
        yield item


def single_label(batch: Any) -> bool:
    """Whether what stands in the place of labels is one number."""
    label: Any = None
    if isinstance(batch, Mapping):
        label = next((batch[key] for key in LABEL_KEYS if key in batch), None)
    elif isinstance(batch, (tuple, list)) and len(batch) > 1:
        label = batch[1]
    return isinstance(label, Number) or (isinstance(label, Tensor) and label.dim() == 0)


def _single_samples(loader: Any) -> str:
    return (
        f"loader is a {type(loader).__name__}, which gives single samples, not batches; pass "
        "DataLoader(dataset, batch_size=64), or DataLoader(dataset, batch_size=None) if its items are batches"
    )


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
    first, target = _likely(kwargs)
    at = "batch" if inner is batch else "batch[0]"
    label_fn = "" if labels is not None else f". Where labels are needed, pass label_fn=lambda batch: {at}[{target!r}]"
    return (
        f"the loader gives dicts, so the model was called with the keyword arguments {', '.join(kwargs) or '(none)'}. "
        f"If its forward takes others, pass forward_fn=lambda model, batch: model({at}[{first!r}]); forward_fn gets "
        f"example_inputs, too, so give these as the loader gives its batches{label_fn}"
    )


def keyed_labels(batch: Any) -> str:
    """For a dict without the keys at which labels are looked for: which it has, and the remedy.

    Example:
        >>> keyed_labels({"image": torch.zeros(2, 3), "target": torch.zeros(2)})
        ". The loader gives dicts with image, target; 'labels' or 'label' are read; pass label_fn=lambda batch: \
batch['target']"
        >>> keyed_labels(torch.zeros(2))
        ''
    """
    if not isinstance(batch, Mapping):
        return ""
    keys, (_, target) = ", ".join(map(str, batch)), _likely(batch)
    read = " or ".join(map(repr, LABEL_KEYS))
    return f". The loader gives dicts with {keys}; {read} are read; pass label_fn=lambda batch: batch[{target!r}]"


def _likely(batch: Mapping[str, Any]) -> tuple[str, str]:
    """Keys of what may be the input and the labels."""
    tensors = [key for key, value in batch.items() if isinstance(value, Tensor)]
    first = next((key for key in tensors if batch[key].dim() > 1), next(iter(batch), "input"))
    return first, next((key for key in tensors if key != first and batch[key].dim() == 1), "target")
