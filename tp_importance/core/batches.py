"""What a batch holds: the inputs of the network, the labels, how many samples, and several batches as one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from numbers import Number
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

__all__ = [
    "FlatBatch",
    "joined",
    "keyed_labels",
    "likely_keys",
    "sample_count",
    "single_label",
    "split_batch",
    "tensors_in",
]

LABEL_KEYS = ("labels", "label")


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


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in nested tuples, lists, dicts and data classes, in order."""
    found = list[Tensor]()
    _gather(value, found)
    return found


_PLAIN = frozenset({int, float, bool, str, type(None), slice, torch.Size, torch.dtype, torch.device})
"""Types of what holds no tensors and is met all the time."""


def _gather(value: Any, found: list[Tensor]) -> None:
    kind = type(value)
    if kind in _PLAIN:
        return
    if kind is tuple or kind is list:
        for part in value:
            _gather(part, found)
    elif kind is dict:
        for part in value.values():
            _gather(part, found)
    elif isinstance(value, Tensor):
        found.append(value)
    else:  # named tuples, containers that somebody registered with torch, ...
        for leaf in tree_leaves(value):
            if isinstance(leaf, Tensor):
                found.append(leaf)
            elif is_dataclass(leaf) or isinstance(leaf, SimpleNamespace):
                _gather(dict(vars(leaf)), found)


def sample_count(values: Iterable[Any]) -> int | None:
    """How many samples there are in inputs, a batch, or its labels: the batch dimension comes first.

    Args:
        values: of which the first tensor with a dimension counts; what is no tensor is passed over.

    Returns:
        The length of that tensor, ``None`` if there is none.

    Example:
        >>> sample_count([0.5, torch.tensor(1.0), torch.zeros(4, 3)]), sample_count(["a"])
        (4, None)
    """
    return next((len(value) for value in values if isinstance(value, Tensor) and value.dim()), None)


@dataclass(frozen=True)
class FlatBatch:
    """The tensors of a batch and how they are nested.

    Attributes:
        tensors: all of the same length, at least one.
        form: by which they are nested again.
    """

    tensors: list[Tensor]
    form: TreeSpec

    @classmethod
    def of(cls, batch: Any) -> FlatBatch | None:
        """``None`` if the batch holds something else than tensors of one length."""
        leaves, form = tree_flatten(batch)
        lengths = {len(leaf) if isinstance(leaf, Tensor) and leaf.dim() else None for leaf in leaves}
        return cls(leaves, form) if len(lengths) == 1 and None not in lengths else None

    @property
    def samples(self) -> int:
        """Length of the tensors."""
        return len(self.tensors[0])

    def part(self, start: int, stop: int | None) -> FlatBatch:
        """Some of the samples; their memory is that of the batch."""
        return FlatBatch([t[start:stop] for t in self.tensors], self.form)


def joined(batches: Sequence[FlatBatch | None]) -> Any | None:
    """Several batches as one, in the form they had.

    Args:
        batches: at least one.

    Returns:
        ``None`` if they do not fit together: one is missing, or forms, shapes of samples, dtypes or devices differ.

    Example:
        >>> x, y = joined([FlatBatch.of((torch.zeros(n, 3), torch.zeros(n))) for n in (4, 1)])
        >>> x.shape, y.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """
    flat = [batch for batch in batches if batch is not None]
    if len(flat) < len(batches) or any(batch.form != flat[0].form for batch in flat):
        return None
    columns = list(zip(*(batch.tensors for batch in flat), strict=True))
    if any(len({(t.shape[1:], t.dtype, t.device) for t in column}) > 1 for column in columns):
        return None
    return tree_unflatten([torch.cat(column) if len(column) > 1 else column[0] for column in columns], flat[0].form)


def single_label(batch: Any) -> bool:
    """Whether what stands in the place of labels is one number."""
    label: Any = None
    if isinstance(batch, Mapping):
        label = next((batch[key] for key in LABEL_KEYS if key in batch), None)
    elif isinstance(batch, (tuple, list)) and len(batch) > 1:
        label = batch[1]
    return isinstance(label, Number) or (isinstance(label, Tensor) and label.dim() == 0)


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
    keys, (_, target) = ", ".join(map(str, batch)), likely_keys(batch)
    read = " or ".join(map(repr, LABEL_KEYS))
    return f". The loader gives dicts with {keys}; {read} are read; pass label_fn=lambda batch: batch[{target!r}]"


def likely_keys(batch: Mapping[str, Any]) -> tuple[str, str]:
    """Keys of what may be the input and the labels."""
    tensors = [key for key, value in batch.items() if isinstance(value, Tensor)]
    first = next((key for key in tensors if batch[key].dim() > 1), next(iter(batch), "input"))
    return first, next((key for key in tensors if key != first and batch[key].dim() == 1), "target")
