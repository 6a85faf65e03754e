"""The labels of a batch, checked: which classes count, and how many samples each has."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.batches import keyed_labels, sample_count, single_label, split_batch, tensors_in
from ..core.forward import ForwardFn
from ..graph.layer_kinds import CONV

__all__ = [
    "LabelFn",
    "batch_labels",
    "check_range",
    "counted",
    "labels_per_position",
    "labels_per_row",
    "require_classes",
    "wanted_classes",
]

LabelFn = Callable[[Any], Tensor]
"""``label_fn(batch)``: the labels of a batch as the loader gave it, 1-D integers."""

_BATCHED = "if it gives single samples, pass DataLoader(dataset, batch_size=64)"


def wanted_classes(classes: Sequence[int] | None) -> Tensor | None:
    """The chosen labels, checked; ``None`` for all."""
    if classes is None:
        return None
    values = list(classes)
    if not values or any(isinstance(c, bool) or not isinstance(c, int) or c < 0 for c in values):
        raise ValueError(f"classes={values!r} must be non-negative integer labels, e.g. classes=[0, 3]")
    if len(set(values)) != len(values):
        raise ValueError(f"classes={values!r} names a class twice")
    return torch.tensor(values, device="cpu")


def counted(labels: Tensor, counts: Tensor) -> Tensor:
    """Samples per label so far, int64, shape (K,); negative labels do not count.

    Args:
        labels: of a batch, shape (N,).
        counts: those before it; K grows as labels come.
    """
    seen = torch.bincount(labels[labels >= 0], minlength=len(counts))
    seen[: len(counts)] += counts
    return seen


def require_classes(wanted: Tensor | None, counts: Tensor) -> None:
    """Refuse chosen classes of which there is no sample.

    Args:
        wanted: the chosen labels, ``None`` for all.
        counts: samples per label, shape (K,).

    Raises:
        ValueError: naming them and what there is.
    """
    missing = [c for c in ([] if wanted is None else wanted.tolist()) if c >= len(counts) or counts[c] == 0]
    if missing:
        there = counts.nonzero().flatten().tolist()
        raise ValueError(f"classes {missing} do not occur in the loader; of the chosen ones it has {there}")


def batch_labels(batch: Any, label_fn: LabelFn | None, forward_fn: ForwardFn | None, needed: bool) -> Tensor:
    """Labels of a batch, int64, shape (N,); zeros for what is none and not needed."""
    if not needed:
        try:
            return _read_labels(batch, label_fn, forward_fn, False)
        except (TypeError, ValueError):  # targets of another task
            return torch.zeros(_samples(batch), dtype=torch.int64, device="cpu")
    return _read_labels(batch, label_fn, forward_fn, True)


def _read_labels(batch: Any, label_fn: LabelFn | None, forward_fn: ForwardFn | None, needed: bool) -> Tensor:
    if label_fn is not None:
        labels: Any = label_fn(batch)
    else:
        try:
            labels = split_batch(batch)[2]
        except TypeError:
            if forward_fn is None:
                raise
            labels = None
    if labels is None:
        if needed:
            if single_label(batch):
                raise ValueError(f"the loader gives one number for the labels of a batch; {_BATCHED}")
            raise ValueError(
                "the loader gives no labels; yield (inputs, labels) or pass label_fn" + keyed_labels(batch)
            )
        return torch.zeros(_samples(batch), dtype=torch.int64, device="cpu")
    if not isinstance(labels, Tensor):
        labels = torch.as_tensor(labels, device="cpu")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels are of dtype {labels.dtype}; integer class indices are needed")
    if labels.dim() != 1:
        remedy = "one-hot: y.argmax(1)" if labels.dim() else _BATCHED
        raise ValueError(f"labels have shape {tuple(labels.shape)}; 1-D class indices are needed ({remedy})")
    labels = labels.detach().cpu().long()
    if len(labels) and int(labels.min()) < 0:
        raise ValueError(f"label {int(labels.min())} is negative; class indices start at 0")
    if label_fn is None and len(labels) != _samples(batch):
        raise ValueError(f"{len(labels)} labels for a batch of {_samples(batch)}")
    return labels


def _samples(batch: Any) -> int:
    try:
        args, kwargs, _ = split_batch(batch)
        values: Iterable[Any] = (*args, *kwargs.values())
    except TypeError:
        values = tensors_in(batch)
        if not values:
            raise
    count = sample_count(values)
    if count is None:
        raise ValueError("a batch holds no tensor with a batch dimension; pass forward_fn and label_fn")
    return count


def check_range(labels: Tensor, output: Any) -> None:
    """Refuse class indices that a 2-D output has no column for."""
    if isinstance(output, Tensor) and output.dim() == 2 and len(labels) == len(output) and len(labels):
        if int(labels.max()) >= output.shape[1] > 1:
            raise ValueError(f"label {int(labels.max())} is out of range for an output of {output.shape[1]} classes")


def labels_per_position(name: str, module: nn.Module, x: Tensor, out: Tensor, labels: Tensor) -> Tensor:
    """Labels of the positions of a layer's output, shape (R, Q), where it has those of the batch; else of its rows.

    Args:
        name: of the layer.
        module: the layer.
        x: its input.
        out: its output, or a tensor of its shape.
        labels: of samples, shape (N,), or of their positions, shape (N, T).
    """
    if labels.dim() == x.dim() == 2 and len(x) == labels.numel():  # the tokens of all samples, one per row
        return labels.flatten()
    if labels.dim() < 2 or len(x) != len(labels):
        return labels_per_row(name, x, labels)
    first, sizes = labels.shape[1], out.shape[2:] if isinstance(module, CONV) else x.shape[1:-1]
    if not sizes or sizes[0] != first:
        return labels_per_row(name, x, labels)
    return labels.repeat_interleave(math.prod(sizes[1:]), 1)


def labels_per_row(name: str, x: Tensor, labels: Tensor) -> Tensor:
    """Labels of the rows of a layer's input: windows or tokens may be folded into its batch.

    Args:
        name: of the layer.
        x: its input.
        labels: of samples, shape (N,), or of their positions, shape (N, T); a sample counts if one of these does.
    """
    labels = labels.amax(1) if labels.dim() == 2 else labels
    if len(x) == len(labels):
        return labels
    if len(labels) and bool((labels == labels[0]).all()):  # a router may send any number of rows
        return labels[:1].expand(len(x))
    if len(x) % max(len(labels), 1):
        raise ValueError(f"layer {name}: batch of {len(x)} for {len(labels)} labels; batch must come first")
    return labels.repeat_interleave(len(x) // len(labels))
