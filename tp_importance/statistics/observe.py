"""One pass over a loader, watching some layers; the model is left as it was found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from operator import length_hint
from typing import Any

import torch
from torch import Tensor, nn

from ..core.arguments import checked_model
from ..core.batches import tensors_in
from ..core.devices import reference_tensor
from ..core.forward import ForwardFn, fresh_inputs, layer_input, run_batch
from ..core.loaders import iterate
from ..core.positions import counted_positions, with_positions
from ..core.precision import at_least_float, undisturbed
from ..core.progress import phase
from ..core.untouched import untouched
from ..graph.layer_pruners import RECURRENT
from ..graph.patches import require_batched, samples_first
from .labels import (
    LabelFn,
    batch_labels,
    check_range,
    counted,
    labels_per_position,
    labels_per_row,
    require_classes,
    wanted_classes,
)

__all__ = ["Observed", "Watch", "WatchFn", "observe"]

WatchFn = Callable[[Tensor, Tensor, Tensor], None]


@dataclass(frozen=True)
class Watch:
    """Call ``fn(input, output, labels)`` whenever ``module`` runs.

    ``labels`` are int64, one per row of the input's first dimension, -1 for samples outside the chosen classes. With
    ``by_position`` they have shape (rows, positions) where padding is known, -1 there.
    Half-precision tensors arrive as float32.
    """

    name: str
    module: nn.Module
    fn: WatchFn
    by_position: bool = False


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
    progress: bool | None = None,
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
        progress: show a progress bar; by default in a terminal.
        before_batch: called with the labels of each batch before it runs, for what looks at several layers; of its
            positions, shape (N, T), where padding is known (:func:`.counted_positions`).
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
    counts = torch.zeros(0, dtype=torch.int64, device="cpu")
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
            known = need_labels or label_fn is not None
            marks = labels if known else labels.clamp(max=0)  # 0 and -1 say what counts, of any number of rows
            current[:] = [with_positions(marks, counted_positions(batch, forward_fn)).to(device)]
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


def _hook(watch: Watch, current: list[Tensor]) -> Callable[..., None]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        x, labels = layer_input(args, kwargs), current[0]
        require_batched(watch.name, watch.module, x)
        if isinstance(watch.module, RECURRENT):  # which return their state as well
            x, output = samples_first(watch.module, x), tensors_in(output)[0]
        with undisturbed(x.device):
            if watch.by_position:
                labels = labels_per_position(watch.name, watch.module, x, output, labels)
            else:
                labels = labels_per_row(watch.name, x, labels)
            watch.fn(at_least_float(x), at_least_float(output), labels)

    return hook
