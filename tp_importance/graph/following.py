"""Which batch norm follows a layer, as a recorded pass shows it."""

from __future__ import annotations

from torch import nn

from .dataflow import Flow, Op, Span
from .layer_kinds import is_batch_norm

__all__ = ["batch_norm_behind", "feeds_alone"]

_SCALED = {"mul", "rmul", "imul"}
_SHIFTED = {"add", "radd", "iadd"}


def batch_norm_behind(flow: Flow, layer: nn.Module) -> nn.Module | None:
    """The batch norm that alone receives whatever a layer gives, if there is one.

    It may be of torch, or a frozen one that computes x * scale + shift; a module that does more than to normalise, such
    as a batch norm with an activation inside, is none.

    Args:
        flow: what reads what.
        layer: the layer.

    Example:
        >>> import torch
        >>> from tp_importance.graph.dataflow import record
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
        >>> flow = record(net, torch.zeros(1, 3, 8, 8))
        >>> batch_norm_behind(flow, net[0]) is net[1], batch_norm_behind(flow, net[3])
        (True, None)
    """
    norms = [_norm_of(flow, value) for op in flow.calls(layer) for value in op.outputs]
    return norms[0] if norms and all(norm is norms[0] for norm in norms) else None


def feeds_alone(flow: Flow, layer: nn.Module, norm: nn.Module) -> bool:
    """Whether a batch norm receives what one layer gives, and nothing else.

    Args:
        flow: what reads what.
        layer: the layer.
        norm: the batch norm behind it, see :func:`batch_norm_behind`.
    """
    given = [op.inputs for op in flow.calls(norm)] + [span.inputs for span in flow.spans if span.module is norm]
    return all(_source(flow, inputs[0]) is layer for inputs in given)


def _norm_of(flow: Flow, value: int) -> nn.Module | None:
    """The batch norm that alone reads a tensor."""
    consumers = flow.consumers.get(value, [])
    if value in flow.outputs or len(consumers) != 1:
        return None
    op = consumers[0]
    if is_batch_norm(op.module):
        return op.module
    spans = [span for span in flow.spans if span.inputs == (value,) and is_batch_norm(span.module)]
    if spans:
        return spans[0].module if _normalises(flow, spans[0], op) else None
    return _norm_of(flow, op.outputs[0]) if _hands_on(op) else None


def _hands_on(op: Op) -> bool:
    return op.module is None and op.kind == "same" and len(op.outputs) == 1


def _normalises(flow: Flow, span: Span, first: Op) -> bool:
    """Whether a batch norm does nothing else than to normalise: in one function, or as x * scale + shift."""
    if first.outputs == span.outputs:
        return first.name == "batch_norm"
    behind = flow.consumers.get(first.outputs[0], []) if len(first.outputs) == 1 else []
    if first.name not in _SCALED or len(behind) != 1:
        return False
    return behind[0].name in _SHIFTED and behind[0].outputs == span.outputs


def _source(flow: Flow, value: int) -> nn.Module | None:
    """The layer that a tensor comes from as it is."""
    op = flow.maker.get(value)
    while op is not None and _hands_on(op):
        op = flow.maker.get(op.inputs[0])
    return None if op is None else op.module
