"""Labels through operations that sum products over channels: convolutions, matrix products, embeddings."""

from __future__ import annotations

import torch
from torch import Tensor

from .calls import Call, Layers, Run
from .layers import along, axes_of, compact, merged, on_axis, pairs_of

__all__ = ["RULES", "consumed", "labels_along", "match_products"]


def consumed(run: Run, tensor: Tensor, axis: int) -> Tensor | None:
    """Labels that are summed over, per index of an axis, shape (C,); what meets at one index is tied.

    Returns:
        ``None`` if nothing has labels there.
    """
    found: Tensor | None = None
    for layer in run.layers(tensor):
        if axis in axes_of(layer):
            labels, pairs = along(layer, axis)
            run.ledger.tie(pairs)
            if found is not None:
                run.ledger.tie(pairs_of(found, labels))
                labels = torch.where(found != 0, found, labels)
            found = labels
    return found


def labels_along(layers: Layers, axis: int) -> Tensor | None:
    """All labels per index of an axis, shape (C, m), of whatever layer has any there."""
    layer = next((layer for layer in layers if axis >= 0 and axis in axes_of(layer)), None)
    return None if layer is None else compact(layer).movedim(axis, 0).flatten(1)


def match(run: Run, data: Tensor | None, weight: Tensor | None, where: str) -> None:
    """Channels of data are multiplied by those of a weight and summed over; both have shape (C,)."""
    for a, b in ((data, weight), (weight, data)):
        if a is not None:
            alone = a if b is None else torch.where(b == 0, a, 0)
            run.flag(alone, "pinned", f"{where}: its channels meet values that belong to no channel")
    if data is not None and weight is not None:
        run.ledger.tie(pairs_of(data, weight))


def convolution(run: Run, call: Call) -> list[Layers]:
    """``convolution(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups)``.

    The weight is (outputs, inputs of one group, ...), transposed (inputs, outputs of one group, ...).
    """
    x, weight, bias = call.args[:3]
    transposed, groups = call.args[6], call.args[8]
    out = call.outputs[0]
    data, rows = consumed(run, x, 1), consumed(run, weight, 0)
    columns = consumed(run, weight, 1) if weight.shape[1] > 1 else None
    within, produced = (rows, columns) if transposed else (columns, rows)
    if x.shape[1] == groups > 1:  # every channel has filters of its own, and goes with all of them
        per_input = out.shape[1] // groups
        if transposed:
            match(run, data, rows, call.where)
            if columns is not None:
                run.flag(columns, "pinned", f"{call.where}: every group has all of these outputs")
            produced = None if rows is None else rows.repeat_interleave(per_input)
        else:
            match(run, None if data is None else data.repeat_interleave(per_input), rows, call.where)
    elif out.shape[1] == groups > 1:  # every filter has channels of its own
        if transposed:
            match(run, data, rows, call.where)
        else:
            match(run, data, None if rows is None else rows.repeat_interleave(x.shape[1] // groups), call.where)
        if transposed and rows is not None:
            _tie_within(run, rows, groups)
            produced = rows[:: x.shape[1] // groups]
        elif columns is not None:
            run.flag(columns, "pinned", f"{call.where}: every group has all of these inputs")
    else:
        if groups > 1 and transposed and produced is not None:
            produced = produced.repeat(groups)
        elif groups > 1 and within is not None and not transposed:
            within = within.repeat(groups)
        if x.shape[1] > 1:
            match(run, data, within, call.where)
        for labels in (data, produced) if groups > 1 else ():
            _tie_blocks(run, labels, groups)
    kept = [] if produced is None else [on_axis(produced, 1, out.shape)]
    kept += _through(run, call, x, weight)
    if bias is not None and run.layers(bias):
        labels = run.layers(bias)[0]
        return [run.combine([(out, tuple(kept)), (bias, (on_axis(labels, 1, out.shape),))], out.shape, call.where)]
    return [tuple(kept)]


def _tie_within(run: Run, labels: Tensor, groups: int) -> None:
    """All channels of a group go together."""
    run.ledger.tie(merged(labels.view(groups, -1), 1)[1])


def _tie_blocks(run: Run, labels: Tensor | None, groups: int) -> None:
    """The j-th channel of every group goes with the j-th of all others."""
    if labels is not None:
        run.ledger.tie(merged(labels.view(groups, -1), 0)[1])


def _through(run: Run, call: Call, x: Tensor, weight: Tensor) -> list[Tensor]:
    """Layers of other axes: those of samples stay, those of pixels too if the kernel sees one at a time."""
    kept, out = [], call.outputs[0]
    pointwise = weight.shape[2:].numel() == 1 and out.shape[2:] == x.shape[2:]
    for layer in run.layers(x):
        axes = set(axes_of(layer))
        if 1 in axes:
            continue
        if axes == {0} or pointwise:
            kept.append(compact(layer).expand(out.shape))
        else:
            run.flag(layer, "mixed", f"{call.where} mixes its channels")
    return kept


def _product(run: Run, a: Tensor, b: Tensor, out: Tensor, where: str) -> Layers:
    """Layers of the matrix product of a, shape (..., n, k), and b, shape (..., k, m)."""
    la, lb = run.layers(a), run.layers(b)
    if run.depends(a) and run.depends(b):
        la, lb = (tuple(v for v in layers if _attends(run, t, v, t is a, where)) for t, layers in ((a, la), (b, lb)))
        fronts = [labels_along((*la, *lb), k) for k in range(a.dim() - 2)]
        sides = (labels_along(la, a.dim() - 2), labels_along(lb, b.dim() - 1) if b.dim() > 1 else None)
        run.ledger.count(out.numel() * a.shape[-1], [*fronts, labels_along(la, a.dim() - 1), *sides])
    elif run.depends(a):
        _count_shared(run, a, b, -1, -1, out.numel() * a.shape[-1])
    elif run.depends(b):
        _count_shared(run, b, a, -2, -2, out.numel() * a.shape[-1])
    summed = [layer for layer in la if a.dim() - 1 in axes_of(layer)]
    other = [layer for layer in lb if max(b.dim() - 2, 0) in axes_of(layer)]
    if a.shape[-1] > 1:
        match_products(run, a, b, summed, other, where)
    kept: list[Tensor] = []
    batches: list[tuple[Tensor, Layers]] = []
    for tensor, layers, gone, axis in ((a, la, summed, -1), (b, lb, other, -2)):
        own: list[Tensor] = []
        for layer in layers:
            if any(layer is s for s in gone):
                continue
            if tensor.dim() == out.dim():
                made = layer.narrow(axis, 0, 1).expand(out.shape)
                (own if set(axes_of(made)) <= set(range(out.dim() - 2)) else kept).append(made)
            elif tensor is a:
                kept.append(layer[..., 0].expand(out.shape))
            elif b.dim() == 2:
                kept.append(layer.select(-2, 0).expand(out.shape))
        batches.append((tensor, tuple(own)))
    if any(layers for _, layers in batches):  # heads, say: matrices of one with those of the other
        kept += run.combine(batches, out.shape, where)
    return tuple(kept)


def _count_shared(run: Run, data: Tensor, weight: Tensor, summed: int, produced: int, macs: int) -> None:
    """A product with a weight, if it is made for every channel of another axis of the data than is summed over.

    Args:
        run: the pass.
        data: one factor.
        weight: the other one.
        summed: axis of the data, counted from the end.
        produced: axis of the weight that comes out, likewise.
        macs: multiply-accumulates.
    """
    layers = run.layers(weight)
    axes = [labels_along(run.layers(data), k) for k in range(data.dim())]
    others = [found for k, found in enumerate(axes) if k != max(data.dim() + summed, 0)]
    if any(found is not None and bool(found.any()) for found in others):
        made = labels_along(layers, weight.dim() + produced) if weight.dim() > 1 else None
        names = set().union(*map(run.ledger.names, layers))
        if names:  # else a constant, whose products are not counted
            run.ledger.count(macs, [*axes, made], sorted(names))


def _attends(run: Run, tensor: Tensor, layer: Tensor, left: bool, where: str) -> bool:
    """Tell the pass of a factor of a product of data with data; whether some of it may go."""
    asks = left and tensor.dim() - 1 in axes_of(layer)
    return run.attend(layer, (-1, -2) if tensor.dim() > 1 else (-1,), where, queries="perhaps" if asks else "no")


def match_products(run: Run, a: Tensor, b: Tensor, summed: list[Tensor], other: list[Tensor], where: str) -> None:
    """Tie what is summed over, within every matrix of a batch."""
    sides = []
    for layers, dim in ((summed, -1), (other, -2 if b.dim() > 1 else -1)):
        found: Tensor | None = None
        for layer in layers:
            rows = dim - 1 if dim == -1 else -1
            if layer.dim() > 1 and rows % layer.dim() in axes_of(layer):  # labels of a channel vary over rows
                layer, pairs = merged(layer, rows)
                run.ledger.tie(pairs)
            elif layer.dim() > 1:
                layer = layer.narrow(rows, 0, 1)
            layer = layer.movedim(dim, -1).squeeze(-2) if layer.dim() > 1 else layer
            found = layer if found is None else run.meet(found, layer, where)
        sides.append(found)
    left, right = sides
    if left is not None and right is not None:
        a, b = torch.broadcast_tensors(compact(left), compact(right))
        run.meet(a, b, where)
        return
    for labels in (left, right):
        if labels is not None:
            run.flag(labels, "pinned", f"{where}: its channels meet values that belong to no channel")


def product(run: Run, call: Call) -> list[Layers]:
    """``mm``, ``bmm``, ``mv``, ``dot``."""
    return [_product(run, call.args[0], call.args[1], call.outputs[0], call.where)]


def added_product(run: Run, call: Call) -> list[Layers]:
    """``addmm(bias, a, b)`` and ``baddbmm``."""
    bias, a, b = call.args[:3]
    out = call.outputs[0]
    own = _product(run, a, b, out, call.where)
    if call.kwargs.get("beta", 1) == 0:  # what is added does not matter, and may be empty memory
        return [own]
    return [run.combine([(out, own), (bias, run.layers(bias))], out.shape, call.where)]


def linear(run: Run, call: Call) -> list[Layers]:
    """``linear(x, weight, bias)``, where it arrives as one operation."""
    x, weight, bias = call.args[0], call.args[1], call.argument(2, "bias")
    out = call.outputs[0]
    if run.depends(x) and not run.depends(weight):
        _count_shared(run, x, weight, -1, -2, out.numel() * x.shape[-1])
    if x.shape[-1] > 1:
        match(run, consumed(run, x, x.dim() - 1), consumed(run, weight, 1), call.where)
    kept = [layer[..., :1].expand(out.shape) for layer in run.layers(x) if x.dim() - 1 not in axes_of(layer)]
    produced = consumed(run, weight, 0)
    if produced is not None:
        kept.append(on_axis(produced, out.dim() - 1, out.shape))
    operands = [(out, tuple(kept))] + ([] if bias is None else [(bias, run.layers(bias))])
    return [run.combine(operands, out.shape, call.where)]


def embedding(run: Run, call: Call) -> list[Layers]:
    """``embedding(weight, indices)``: rows are chosen by the data, columns are channels."""
    weight, out = call.args[0], call.outputs[0]
    kept = []
    for layer in run.layers(weight):
        if 0 in axes_of(layer):
            run.flag(layer, "pinned", f"{call.where}: the data chooses among its rows")
        else:
            kept.append(on_axis(layer[0], out.dim() - 1, out.shape))
    return [tuple(kept)]


RULES = {
    "convolution": convolution,
    "_convolution": convolution,
    **dict.fromkeys(("mm", "bmm", "mv", "dot", "matmul"), product),
    **dict.fromkeys(("addmm", "baddbmm", "addmv"), added_product),
    "linear": linear,
    "embedding": embedding,
}
