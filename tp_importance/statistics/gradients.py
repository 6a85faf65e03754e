"""Gradients of the loss for criteria that look at them, and the model without them afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from operator import length_hint
from typing import Any

import torch
from torch import Tensor, nn

from ..core.batches import keyed_labels, split_batch
from ..core.devices import to_model
from ..core.forward import ForwardFn, run_batch
from ..core.guards import gradients_kept
from ..core.loaders import iterate
from ..core.progress import track
from ..core.untouched import untouched
from ..graph.reparametrised import as_leaves
from .labels import LabelFn

__all__ = ["LossFn", "checked_loss_fn", "loss_gradients", "loss_of"]

LossFn = Callable[[Any, Any], Tensor]
"""``loss_fn(output, labels)``: a scalar to be made small, from what the network (or ``forward_fn``) gave."""


@contextmanager
def loss_gradients(
    model: nn.Module,
    loader: Iterable[Any],
    loss_fn: LossFn = nn.functional.cross_entropy,
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
        loss_fn: ``loss_fn(output, labels)``, see :func:`loss_of`.
        forward_fn: ``forward_fn(model, batch)``.
        label_fn: ``label_fn(batch)``.

    Raises:
        TypeError: if the loss is the cross entropy and the network's output no tensor; names the remedy.
        ValueError: if there is no batch, one has no labels or such as the loss cannot take, or a loss is no scalar or
            not finite.

    Example:
        >>> net = nn.Linear(3, 2)
        >>> with loss_gradients(net, [(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))]):
        ...     net.weight.grad.shape
        torch.Size([2, 3])
        >>> net.weight.grad is None
        True
    """
    checked_loss_fn(loss_fn)
    with gradients_kept(model), as_leaves(model):
        with untouched(model), torch.inference_mode(False), torch.enable_grad():
            model.eval()
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    parameter.requires_grad_(True)
            model.zero_grad(set_to_none=True)
            batches = 0
            for batch in track(iterate(loader), "computing gradients", length_hint(loader), unit="batch"):
                labels = split_batch(batch)[2] if label_fn is None else label_fn(batch)
                if labels is None:
                    raise ValueError(
                        "gradients of the loss need labels: the loader must give (inputs, labels), or pass label_fn"
                        + keyed_labels(batch)
                    )
                loss_of(loss_fn, run_batch(model, batch, forward_fn), to_model(model, labels)).backward()
                batches += 1
            if not batches:
                raise ValueError("the loader gave no batch; a re-iterable of labelled batches is needed")
        yield


def loss_of(loss_fn: LossFn, output: Any, labels: Any) -> Tensor:
    """The loss of a batch, to be called ``backward()`` on, if it is one.

    Args:
        loss_fn: ``loss_fn(output, labels)``. For the cross entropy of torch (function or module) output and
            labels are checked first: logits of shape (N, K, ...) and either class indices, shape (N, ...), or
            probabilities.
        output: of the network.
        labels: of the batch, on its device.

    Returns:
        Scalar.

    Raises:
        TypeError: if the output or the labels are not what the cross entropy takes, or the loss is no tensor.
        ValueError: for labels of another shape or out of range, and a loss that is no scalar, not finite, or does not
            depend on the network. What ``loss_fn`` raises by itself gets a note on what it was called with.

    Example:
        >>> loss_of(nn.functional.cross_entropy, (torch.zeros(2, 4), None), torch.tensor([0, 1]))
        Traceback (most recent call last):
        TypeError: the network returns a tuple, and the cross entropy takes logits, one tensor: pass \
loss_fn=lambda output, labels: F.cross_entropy(output[0], labels)
        >>> loss_of(nn.functional.mse_loss, torch.zeros(2, requires_grad=True), torch.ones(2)).item()
        1.0
    """
    if isinstance(loss_fn, nn.CrossEntropyLoss):
        labels = _checked_targets(output, labels, loss_fn.ignore_index)
    elif loss_fn is nn.functional.cross_entropy:
        labels = _checked_targets(output, labels)
    try:
        loss = loss_fn(output, labels)
    except Exception as error:
        error.add_note(f"loss_fn(output, labels) was called with {_described(output)} and {_described(labels)}")
        raise
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn gives {_described(loss)}; it must give a tensor of one number")
    if loss.numel() != 1:
        raise ValueError(
            f"loss_fn gives a tensor of shape {tuple(loss.shape)}; it must give one number, e.g. its .mean()"
        )
    if not torch.isfinite(loss).all():
        raise ValueError(f"the loss of a batch is {loss.item()}; check the data, the model and loss_fn")
    if not loss.requires_grad:
        raise ValueError(
            "the loss does not depend on the network's parameters: output or loss are detached, or computed without "
            "gradients; compute it from the output by operations of torch"
        )
    return loss


def checked_loss_fn(loss_fn: Any) -> LossFn:
    """``loss_fn``, if it can be called.

    Raises:
        TypeError: else.
    """
    if isinstance(loss_fn, type):
        raise TypeError(f"loss_fn={loss_fn.__name__} is a class; make one of it: loss_fn={loss_fn.__name__}()")
    if not callable(loss_fn):
        raise TypeError(f"loss_fn={loss_fn!r} must be a function, loss_fn(output, labels)")
    return loss_fn


def _checked_targets(output: Any, labels: Any, ignored: int = -100) -> Tensor:
    """Labels as the cross entropy takes them."""
    if not isinstance(output, Tensor):
        raise TypeError(
            f"the network returns a {type(output).__name__}, and the cross entropy takes logits, one tensor: pass "
            f"loss_fn=lambda output, labels: F.cross_entropy({_logits_in(output)}, labels)"
        )
    y, other = torch.as_tensor(labels, device=output.device), "or pass loss_fn=, if this is no classification"
    if not output.is_floating_point() or output.dim() < 2:
        raise ValueError(
            f"the network gives {_described(output)}, and the cross entropy takes logits of shape (N, classes, ...); "
            "pass loss_fn=lambda output, labels: ..."
        )
    if y.is_floating_point():
        if y.shape != output.shape:
            raise ValueError(
                f"labels are {_described(y)}; for logits of shape {tuple(output.shape)} give class indices as "
                f"integers (labels.long()), or probabilities of that shape, {other}"
            )
        return y
    if y.is_complex() or y.dtype == torch.bool:
        raise TypeError(f"labels are of dtype {y.dtype}; integer class indices are needed, {other}")
    expected = (len(output), *output.shape[2:])
    if y.shape != expected:
        one_hot = ": of one-hot labels their argmax(1), or .float()" if y.shape == output.shape else ""
        raise ValueError(
            f"labels have shape {tuple(y.shape)}; logits of shape {tuple(output.shape)} want class indices of shape "
            f"{expected}{one_hot}, {other}"
        )
    counting = y[y != ignored]
    wrong = counting[(counting < 0) | (counting >= output.shape[1])]
    if len(wrong):
        raise ValueError(
            f"label {int(wrong[0])} is out of range for an output of {output.shape[1]} classes, which are counted from "
            f"0; {ignored} is ignored"
        )
    return y.long()


def _logits_in(output: Any) -> str:
    """How one gets at the logits, as far as can be told."""
    if isinstance(output, Mapping):
        tensors = [key for key, value in output.items() if isinstance(value, Tensor) and value.dim() > 1]
        key = "logits" if "logits" in output else next(iter(tensors), "logits")
        return f"output[{key!r}]"
    if isinstance(output, (tuple, list)) and not hasattr(output, "_fields"):
        return f"output[{next((i for i, value in enumerate(output) if isinstance(value, Tensor)), 0)}]"
    fields: Iterable[str] = getattr(output, "_fields", ()) or getattr(output, "__dict__", {})
    return f"output.{next((name for name in fields if isinstance(getattr(output, name, None), Tensor)), 'logits')}"


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and dtype {str(value.dtype).removeprefix('torch.')}"
    return f"a {type(value).__name__}"
