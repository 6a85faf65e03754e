"""One pass over a loader, watching some layers; the model is left as it was found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from operator import length_hint
from typing import Any

import torch
from torch import Tensor, nn

from ..core.arguments import checked_model
from ..core.batches import keyed_labels, sample_count, single_label, split_batch, tensors_in
from ..core.devices import reference_tensor
from ..core.forward import ForwardFn, fresh_inputs, layer_input, run_batch
from ..core.loaders import iterate
from ..core.progress import phase
from ..core.untouched import untouched
from ..graph.patches import require_batched

__all__ = [
    "LabelFn",
    "Observed",
    "Watch",
    "WatchFn",
    "at_least_float",
    "batch_labels",
    "check_range",
    "counted",
    "labels_per_row",
    "observe",
    "require_classes",
    "wanted_classes",
]

LabelFn = Callable[[Any], Tensor]
"""``label_fn(batch)``: the labels of a batch as the loader gave it, 1-D integers."""

WatchFn = Callable[[Tensor, Tensor, Tensor], None]

_BATCHED = "if it gives single samples, pass DataLoader(dataset, batch_size=64)"


@dataclass(frozen=True)
class Watch:
    """Call ``fn(input, output, labels)`` whenever ``module`` runs.

    ``labels`` are int64, one per row of the input's first dimension, -1 for samples outside the chosen classes.
    Half-precision tensors arrive as float32.
    """

    name: str
    module: nn.Module
    fn: WatchFn


@dataclass(frozen=True)
class Observed:
    """What a pass saw.

    Attributes:
        samples: samples of the chosen classes.
        batches: batches the loader gave.
        class_counts: samples per label, int64, shape (K,).
    """

    samples: int
    batches: int
    class_counts: Tensor


def observe(
    model: nn.Module,
    loader: Iterable[Any],
    watches: Sequence[Watch],
    *,
    classes: Sequence[int] | None = None,
    forward_fn: ForwardFn | None = None,
    label_fn: LabelFn | None = None,
    need_labels: bool = True,
    progress: bool = False,
    before_batch: Callable[[Tensor], None] | None = None,
    gradients: bool = False,
) -> Observed:
    """Run ``model`` once over ``loader`` in eval mode, and show the watched layers' tensors.

    Nothing is stored: what a watch wants to keep, it accumulates. Batches are moved to the device and dtype of the
    model. Modes, hooks and gradient flags are restored on any exit; an exception of the loader passes unchanged.

    Args:
        model: the network.
        loader: re-iterable of batches, with or without ``len``: ``x``, ``(x, y)``, dicts with ``labels``.
        watches: which layers to watch.
        classes: labels that count; the other samples run through the network but reach the watches as -1.
        forward_fn: ``forward_fn(model, batch)`` for batches of another form.
        label_fn: ``label_fn(batch)`` gives their labels.
        need_labels: refuse unlabelled batches and a single class; else unlabelled samples count as class 0.
        progress: show a progress bar.
        before_batch: called with the labels of each batch before it runs, for what looks at several layers.
        gradients: build the graph, for watches that call :func:`torch.autograd.grad`; parameters get no gradients by
            themselves.

    Returns:
        :class:`Observed`.

    Raises:
        ValueError: no batches, no labels, labels that are not 1-D, of the wrong number or out of range, fewer than
            two classes.
        TypeError: labels that are not integers, batches of an unknown form, a model that is none or compiled.

    Example:
        >>> net, sizes = nn.Linear(3, 2), []
        >>> loader = [(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))]
        >>> observe(net, loader, [Watch("", net, lambda x, out, y: sizes.append(len(x)))]).samples, sizes
        (4, [4])
    """
    wanted = wanted_classes(classes)
    current: list[Tensor] = []
    counts = torch.zeros(0, dtype=torch.int64)
    batches = 0
    reference = reference_tensor(checked_model(model))
    device = reference.device if reference is not None else torch.device("cpu")
    with untouched(model), ExitStack() as stack, torch.set_grad_enabled(gradients):
        model.eval()
        for watch in watches:
            stack.callback(watch.module.register_forward_hook(_hook(watch, current), with_kwargs=True).remove)
        running = stack.enter_context(phase("collecting", length_hint(loader) or None, unit="batch", progress=progress))
        for batch in map(fresh_inputs, iterate(loader)) if gradients else iterate(loader):
            labels = batch_labels(batch, label_fn, forward_fn, need_labels)
            if wanted is not None:
                labels = torch.where(torch.isin(labels, wanted), labels, -1)
            current[:] = [labels.to(device)]
            if before_batch is not None:
                before_batch(current[0])
            output = run_batch(model, batch, forward_fn)
            if need_labels:
                check_range(labels, output)
            counts = counted(labels, counts)
            batches += 1
            running.advance()
        running.note(batches=batches, samples=int(counts.sum()))
    if not batches:
        raise ValueError("the loader gave no batch; a re-iterable of batches is needed (a generator runs only once)")
    require_classes(wanted, counts)
    present = int((counts > 0).sum())
    if need_labels and present < 2:
        raise ValueError(f"all {int(counts.sum())} samples are of one class; class-aware statistics need at least two")
    return Observed(int(counts.sum()), batches, counts)


def wanted_classes(classes: Sequence[int] | None) -> Tensor | None:
    """The chosen labels, checked; ``None`` for all."""
    if classes is None:
        return None
    values = list(classes)
    if not values or any(isinstance(c, bool) or not isinstance(c, int) or c < 0 for c in values):
        raise ValueError(f"classes={values!r} must be non-negative integer labels, e.g. classes=[0, 3]")
    if len(set(values)) != len(values):
        raise ValueError(f"classes={values!r} names a class twice")
    return torch.tensor(values)


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
    """Labels of a batch as :func:`observe` reads them, int64, shape (N,); zeros for what is none and not needed."""
    if not needed:
        try:
            return _read_labels(batch, label_fn, forward_fn, False)
        except (TypeError, ValueError):  # targets of another task
            return torch.zeros(_samples(batch), dtype=torch.int64)
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
        return torch.zeros(_samples(batch), dtype=torch.int64)
    if not isinstance(labels, Tensor):
        labels = torch.as_tensor(labels)
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


def _hook(watch: Watch, current: list[Tensor]) -> Callable[..., None]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        x, labels = layer_input(args, kwargs), current[0]
        require_batched(watch.name, watch.module, x)
        with undisturbed(x.device):
            watch.fn(at_least_float(x), at_least_float(output), labels_per_row(watch.name, x, labels))

    return hook


def labels_per_row(name: str, x: Tensor, labels: Tensor) -> Tensor:
    """Labels of the rows of a layer's input: windows or tokens may be folded into its batch."""
    if len(x) == len(labels):
        return labels
    if len(x) % max(len(labels), 1):
        raise ValueError(f"layer {name}: batch of {len(x)} for {len(labels)} labels; batch must come first")
    return labels.repeat_interleave(len(x) // len(labels))


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Statistics in full precision under the user's autocast, and unseen by whoever records operations."""
    with torch._C.DisableTorchFunction(), torch.autocast(device.type, enabled=False):
        yield


def at_least_float(x: Tensor) -> Tensor:
    """Half precision as float32; what is no tensor, such as the outputs of some networks, stays itself."""
    if not isinstance(x, Tensor):
        return x
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
