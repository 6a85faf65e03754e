"""What the output of a layer is added to."""

from __future__ import annotations

from torch import nn

from .dataflow import Flow, Op

__all__ = ["added_to", "addition", "norm_behind"]


def addition(flow: Flow, name: str, norm: nn.Module | None = None) -> Op | None:
    r"""The addition in ``s + bn(layer(x))``, behind a layer that runs once.

    Args:
        flow: recording of the network.
        name: qualified name of the layer.
        norm: the batch norm that may stand between, if any.

    Returns:
        ``None`` if the output of the layer (behind ``norm``, if given) goes anywhere else, or s is broadcast or behind
        no layer, as a parameter is.
    """
    found = _added(flow, name, norm)
    return None if found is None else found[0]


def added_to(flow: Flow, name: str, norm: nn.Module | None = None) -> int | None:
    r"""The tensor s in ``s + bn(layer(x))``, if it is there before the layer runs.

    Args:
        flow: recording of the network.
        name: qualified name of the layer.
        norm: the batch norm that may stand between, if any.

    Returns:
        The tensor's number in ``flow``; ``None`` if the layer runs more than once, its output (behind ``norm``, if
        given) goes anywhere else, or s is made later, broadcast, or behind no layer: an input or a parameter.

    Example:
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
        ...     def forward(self, x):
        ...         x = self.first(x)
        ...         return x + self.second(x)
        >>> import torch
        >>> from tp_importance.graph.dataflow import record
        >>> flow = record(Block(), torch.zeros(1, 2))
        >>> added_to(flow, "second") == flow.ops[0].outputs[0], added_to(flow, "first")
        (True, None)
        >>> addition(flow, "second").outputs == flow.outputs
        True
    """
    found = _added(flow, name, norm)
    if found is None:
        return None
    first = next(i for i, op in enumerate(flow.ops) if op.module is not None and op.name == name)
    return found[1] if any(found[1] in earlier.outputs for earlier in flow.ops[:first]) else None


def norm_behind(flow: Flow, name: str, norm: nn.Module | None = None) -> tuple[int, nn.Module] | None:
    """The layer or RMS norm that alone reads the output of a layer, or the sum that this is added up to.

    Args:
        flow: recording of the network.
        name: qualified name of the layer, which runs once.
        norm: the batch norm that may stand between, if any.

    Returns:
        The number of the tensor that it reads, and the norm; ``None`` if there is none.

    Example:
        >>> import torch
        >>> from tp_importance.graph.dataflow import record
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 2))
        >>> flow = record(net, torch.zeros(1, 2))
        >>> norm_behind(flow, "0") == (flow.ops[0].outputs[0], net[1]), norm_behind(flow, "2")
        (True, None)
    """
    calls = [op for op in flow.ops if op.module is not None and op.name == name]
    if len(calls) != 1:
        return None
    found = addition(flow, name, norm)
    value, op = _only_consumer(flow, calls[0].outputs[0] if found is None else found.outputs[0])
    for span in flow.spans if op is not None else ():
        reads = value in span.inputs and any(flow.ops[i] is op for i in span.ops)
        if reads and isinstance(span.module, (nn.LayerNorm, nn.RMSNorm)) and len(span.module.normalized_shape) == 1:
            return value, span.module
    return None


def _added(flow: Flow, name: str, norm: nn.Module | None) -> tuple[Op, int] | None:
    """The addition, and the tensor s."""
    calls = [op for op in flow.ops if op.module is not None and op.name == name]
    if len(calls) != 1:
        return None
    value, op = _only_consumer(flow, calls[0].outputs[0])
    if op is not None and norm is not None and op.module is norm:
        value, op = _only_consumer(flow, op.outputs[0])
    if op is None or op.kind != "add" or len(op.inputs) != 2 or len(set(op.inputs)) != 2:
        return None
    other = next(v for v in op.inputs if v != value)
    return (op, other) if flow.shapes[other] == flow.shapes[value] and _behind_a_layer(flow, other) else None


def _behind_a_layer(flow: Flow, value: int) -> bool:
    """Whether a tensor depends on the data through a layer; a parameter of the same shape, say, is broadcast later."""
    seen, todo = set[int](), [value]
    while todo:
        op = flow.maker.get(todo.pop())
        if op is None or id(op) in seen:
            continue
        if op.module is not None:
            return True
        seen.add(id(op))
        todo += op.inputs
    return False


def _only_consumer(flow: Flow, value: int) -> tuple[int, Op | None]:
    """The one operation that reads a tensor, past those that hand it on unchanged."""
    consumers = flow.consumers.get(value, [])
    if len(consumers) != 1 or value in flow.outputs:
        return value, None
    return _only_consumer(flow, consumers[0].outputs[0]) if consumers[0].kind == "same" else (value, consumers[0])
