"""Gradients of the loss for criteria that look at them, and the model without them afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from operator import length_hint
from typing import Any

import torch
from torch import Tensor, nn

from .batches import ForwardFn, iterate, run_batch, split_batch, to_model
from .observe import LabelFn
from .progress import track
from .reparametrised import as_leaves
from .untouched import untouched

__all__ = ["loss_gradients"]


@contextmanager
def loss_gradients(
    model: nn.Module,
    loader: Iterable[Any],
    loss_fn: Callable[[Any, Tensor], Tensor] = nn.functional.cross_entropy,
    *,
    forward_fn: ForwardFn | None = None,
    label_fn: LabelFn | None = None,
) -> Iterator[None]:
    """Inside the block every parameter has the gradient of the mean losses of all batches, summed, in eval mode.

    Of a weight that is computed from parameters, it is the weight that has the gradient.

    Afterwards gradients are what they were; parameters that are new, after a surgery say, have none.

    Args:
        model: the network.
        loader: iterable of labelled batches.
        loss_fn: ``loss_fn(output, labels)``.
        forward_fn: ``forward_fn(model, batch)``.
        label_fn: ``label_fn(batch)``.

    Raises:
        ValueError: if there is no batch, or one has no labels.

    Example:
        >>> net = nn.Linear(3, 2)
        >>> with loss_gradients(net, [(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))]):
        ...     net.weight.grad.shape
        torch.Size([2, 3])
        >>> net.weight.grad is None
        True
    """
    before = [(p, p.grad) for p in model.parameters()]
    stack = ExitStack()
    try:
        stack.enter_context(as_leaves(model))  # until the end of the block
        with untouched(model), torch.inference_mode(False), torch.enable_grad():
            model.eval()
            for parameter, _ in before:
                if parameter.is_floating_point():
                    parameter.requires_grad_(True)
            model.zero_grad(set_to_none=True)
            batches = 0
            for batch in track(iterate(loader), "computing gradients", length_hint(loader), unit="batch"):
                labels = split_batch(batch)[2] if label_fn is None else label_fn(batch)
                if labels is None:
                    raise ValueError("gradients of the loss need labels: the loader must give (inputs, labels)")
                loss_fn(run_batch(model, batch, forward_fn), to_model(model, labels)).backward()
                batches += 1
            if not batches:
                raise ValueError("the loader gave no batch; a re-iterable of labelled batches is needed")
        yield
    finally:
        stack.close()
        model.zero_grad(set_to_none=True)
        for parameter, gradient in before:
            parameter.grad = gradient
