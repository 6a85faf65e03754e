"""Labels through operations that only move data: they are executed on the labels as they are on the data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .calls import Call, Layers, Run
from .layers import axes_of, compact, merged, tight

__all__ = ["RULES"]


def _moved(call: Call, source: Tensor, layer: Tensor) -> Any:
    """The operation with a layer in place of its first tensor."""
    args = tuple(layer if a is source else a for a in call.args)
    return call.func(*args, **{k: layer if v is source else v for k, v in call.kwargs.items()})


def moved(run: Run, call: Call, layers: Sequence[Tensor] | None = None) -> list[Layers]:
    """The same operation on the labels, of all layers if none are given."""
    source = call.inputs[0]
    results: list[list[Tensor]] = [[] for _ in call.outputs]
    for layer in run.layers(source) if layers is None else layers:
        try:
            made = _moved(call, source, layer)
        except (RuntimeError, NotImplementedError):  # no kernel for whole numbers
            made = _moved(call, source, layer.double())
        for i, part in enumerate([made] if isinstance(made, Tensor) else made):
            if part.dtype != torch.int64:
                part = part.round().long()
            left = tight(part)
            if left is not None:
                results[i].append(left)
    return [tuple(r) for r in results]


def squeezed(run: Run, call: Call) -> list[Layers]:
    """With one channel left, their axis would go, too."""
    dims = call.args[1] if len(call.args) > 1 else call.kwargs.get("dim", range(call.inputs[0].dim()))
    dims = [d % call.inputs[0].dim() for d in ([dims] if isinstance(dims, int) else dims)]
    for layer in run.layers(call.inputs[0]):
        if set(axes_of(layer)) & set(dims):
            run.ledger.several.append(torch.unique(compact(layer)).cpu().numpy())
    return moved(run, call)


def reshaped(run: Run, call: Call) -> list[Layers]:
    """``view`` and the like: an axis that is split can lose whole slices only."""
    x, shape = call.inputs[0], call.outputs[0].shape
    kept = []
    for layer in run.layers(x):
        made = tight(layer.reshape(shape))
        if made is None:
            continue
        if len(axes_of(made)) > len(axes_of(layer)):
            made = run.split_up(made, call)
        if len(axes_of(made)) == 1:
            run.follow(compact(made).flatten(), axes_of(made)[0])
        kept.append(made)
    return [tuple(kept)]


def shuffled(run: Run, call: Call) -> list[Layers]:
    """``channel_shuffle`` and ``pixel_shuffle``: what lies beside one another stays a whole block of channels.

    Shuffled in g groups, the j-th channel of every group goes with the j-th of all others; of pixels, the r × r
    channels that become one.
    """
    x, factor = call.inputs[0], call.args[1]
    axis = x.dim() - 3 if call.name.startswith("pixel") else 1
    for layer in run.layers(x):
        if axes_of(layer) == (axis,):
            labels = compact(layer).flatten()
            rows = labels.view(factor, -1).T if call.name == "channel_shuffle" else labels.view(-1, factor**2)
            run.ledger.tie(merged(rows, 1)[1])
    return moved(run, call)


def concatenated(run: Run, call: Call) -> list[Layers]:
    """``cat``: layers of the parts that vary along the same other axes belong together."""
    parts, dim, out = call.args[0], call.argument(1, "dim", 0), call.outputs[0]
    return [_concatenated(run, [t for t in parts if t.numel()], dim % max(out.dim(), 1), out)]


def stacked(run: Run, call: Call) -> list[Layers]:
    """``stack``: the parts lie along a new axis."""
    parts, dim, out = call.args[0], call.argument(1, "dim", 0), call.outputs[0]
    return [_concatenated(run, list(parts), dim % out.dim(), out, new_axis=True)]


def _concatenated(run: Run, parts: list[Tensor], dim: int, out: Tensor, *, new_axis: bool = False) -> Layers:
    slots: dict[frozenset[int], dict[int, Tensor]] = {}
    for i, part in enumerate(parts):
        for layer in run.layers(part):
            if new_axis:
                layer = layer.unsqueeze(dim)
            others = frozenset(axes_of(layer)) - {dim}
            key = next((k for k in slots if k == others or k & others), others)
            if i in slots.setdefault(key, {}):  # two layers on the same axes
                layer = run.meet(slots[key][i], layer, "cat")
            slots[key][i] = layer
    made = []
    for key, found in slots.items():
        if key:
            found = _aligned(run, found, dim)
        varying = {k for layer in found.values() for k in axes_of(layer)} | {dim}
        pieces = []
        for i, part in enumerate(parts):
            shape = list(part.shape)
            if new_axis:
                shape.insert(dim, 1)
            small = [s if k in varying else 1 for k, s in enumerate(shape)]
            if i not in found:
                pieces.append(torch.zeros(small, dtype=torch.int64, device=out.device))
            else:
                pieces.append(found[i][tuple(slice(None) if k in varying else slice(1) for k in range(len(small)))])
        joined = tight(torch.cat(pieces, dim).expand(out.shape))
        if joined is not None:
            made.append(joined)
    return tuple(made)


def _aligned(run: Run, found: dict[int, Tensor], dim: int) -> dict[int, Tensor]:
    """Parts one behind the other along an axis without channels, tokens say: index by index they go together."""
    apart = {i: layer for i, layer in found.items() if dim in axes_of(layer)}
    made, first = dict(apart), None
    for i, layer in found.items():
        if i in apart:
            continue
        own = layer.narrow(dim, 0, 1)
        first = own if first is None else run.meet(first, own, "cat")
        made[i] = first.expand(layer.shape)
    return made


def padded(run: Run, call: Call) -> list[Layers]:
    """Padding of height and width is not seen; padded channels belong to none."""
    x, pad, out = call.inputs[0], list(call.args[1]), call.outputs[0]
    kept = []
    for layer in run.layers(x):
        small = compact(layer)
        own: list[int] = []
        for k in range(x.dim() - 1, x.dim() - 1 - len(pad) // 2, -1):
            amount = pad[2 * (x.dim() - 1 - k) : 2 * (x.dim() - 1 - k) + 2]
            own += amount if small.shape[k] > 1 else [0, 0]
        made = torch.nn.functional.pad(small, own) if any(own) else small
        left = tight(made.expand(out.shape))
        if left is not None:
            kept.append(left)
    return [tuple(kept)]


def expanded(run: Run, call: Call) -> list[Layers]:
    """``expand``: one channel for many."""
    shape = call.outputs[0].shape
    return [tuple(layer.expand(shape) for layer in run.layers(call.inputs[0]))]


def repeated(run: Run, call: Call) -> list[Layers]:
    """``repeat``: copies of a channel live and die with it."""
    x, times, out = call.inputs[0], list(call.args[1]), call.outputs[0]
    kept = []
    for layer in run.layers(x):
        small = compact(layer)
        lead = len(times) - small.dim()
        own = [t if k < lead or small.shape[k - lead] > 1 else 1 for k, t in enumerate(times)]
        own[:lead] = [1] * lead
        made = tight(small.repeat(own).expand(out.shape))
        if made is not None:
            kept.append(made)
    return [tuple(kept)]


def flipped(run: Run, call: Call) -> list[Layers]:
    """``flip``: layers that do not vary along the axes stay as they are."""
    x = call.inputs[0]
    dims = _axes(call.argument(1, "dims", []), x)
    results = [layer if not dims & set(axes_of(layer)) else tight(_moved(call, x, layer)) for layer in run.layers(x)]
    return [tuple(r for r in results if r is not None)]


def by_position(run: Run, call: Call) -> list[Layers]:
    """What takes entries by their distance from one another or from the ends: no channel of such an axis can go.

    Rolled by one, the last of eight channels comes to the place of the first; without the last, the seventh does.
    """
    x = call.inputs[0]
    axes = _POSITIONAL[call.name](call, x)
    kept = []
    for layer in run.layers(x):
        if axes & set(axes_of(layer)):
            run.flag(layer, "pinned", f"{call.where} takes channels by their position, counted in the code")
        else:
            kept.append(layer)
    if call.name == "roll":  # of other axes: nothing moves for these layers
        return [tuple(kept)]
    return moved(run, call)


def _axes(dims: Any, x: Tensor) -> set[int]:
    """Axes that were given, all if none was."""
    return {d % x.dim() for d in ([dims] if isinstance(dims, int) else dims)} or set(range(x.dim()))


def _neighbours(call: Call, x: Tensor) -> set[int]:
    """Axes that are padded by what lies at their ends."""
    pads = call.argument(1, "padding", [])
    return {x.dim() - 1 - i // 2 for i, n in enumerate(pads) if n}


_POSITIONAL: dict[str, Callable[[Call, Tensor], set[int]]] = {
    "roll": lambda call, x: _axes(call.argument(2, "dims", []), x),
    "diagonal": lambda call, x: _axes([call.argument(2, "dim1", 0), call.argument(3, "dim2", 1)], x),
    "unfold": lambda call, x: _axes(call.argument(1, "dimension", 0), x),
    "im2col": lambda call, x: _axes([-2, -1], x),
    "gather": lambda call, x: _axes(call.argument(1, "dim", 0), x),
    **dict.fromkeys(("tril", "triu"), lambda call, x: _axes([-2, -1], x)),
    **dict.fromkeys((f"{kind}_pad{n}d" for kind in ("reflection", "replication") for n in (1, 2, 3)), _neighbours),
}


def sliced(run: Run, call: Call) -> list[Layers]:
    """``slice`` and ``narrow``."""
    x, out = call.inputs[0], call.outputs[0]
    axis = call.argument(1, "dim", 0) % max(x.dim(), 1)
    step = call.argument(4, "step", 1) if call.name == "slice" else 1
    if out.shape[axis] != x.shape[axis]:
        start = call.argument(2, "start", 0) or 0
        start = max(start + x.shape[axis], 0) if start < 0 else start
        for layer in run.layers(x):
            if axes_of(layer) == (axis,):
                if step == 1:
                    run.pieces(x, layer, axis, [(start, start + out.shape[axis])], call)
                else:
                    run.flag(layer, "pinned", f"{call.where} takes one channel in {step}")
    return moved(run, call)


def split(run: Run, call: Call) -> list[Layers]:
    """``split`` and ``chunk``."""
    x = call.inputs[0]
    axis = call.argument(2, "dim", 0) % max(x.dim(), 1)
    for layer in run.layers(x):
        if axes_of(layer) == (axis,) and len(call.outputs) > 1:
            ends = np.cumsum([t.shape[axis] for t in call.outputs]).tolist()
            run.pieces(x, layer, axis, list(zip([0, *ends[:-1]], ends, strict=True)), call)
    return moved(run, call)


def selected(run: Run, call: Call) -> list[Layers]:
    """``select`` and ``unbind``: single channels by their number."""
    x = call.inputs[0]
    axis = call.argument(1, "dim", 0) % max(x.dim(), 1)
    for layer in run.layers(x):
        if axes_of(layer) == (axis,) and x.shape[axis] > 1:
            run.flag(layer, "pinned", f"{call.where} takes channels by their number")
    return moved(run, call)


def indexed(run: Run, call: Call) -> list[Layers]:
    """Fixed indices along an axis of channels; along others labels move as the data does."""
    x = call.args[0]
    if call.name == "index":
        axes = {k for k, i in enumerate(call.args[1]) if i is not None}
        if any(run.layers(i) for i in call.args[1] if i is not None):
            return [()]
        indices = [i for i in call.args[1] if i is not None]
    else:
        axes, indices = {call.args[1] % max(x.dim(), 1)}, [call.args[2]]
    table = any(len(torch.unique(i)) < i.numel() for i in indices if i.dtype != torch.bool)  # rows that come again
    kept = []
    for layer in run.layers(x):
        fixed = len(axes_of(layer)) == 1 and set(axes_of(layer)) <= axes
        if fixed and (run.depends(x) or table):
            run.flag(layer, "pinned", f"{call.where} takes channels by their number")
        if not fixed or run.depends(x) or not table:
            kept.append(layer)
    return moved(run, call, kept)


def strided(run: Run, call: Call) -> list[Layers]:
    """``as_strided``: the labels are laid out in memory as the data is."""
    x, out = call.inputs[0], call.outputs[0]
    if out is x or (out.shape == x.shape and out.stride() == x.stride()):
        return [run.layers(x)]
    kept = []
    for layer in run.layers(x):
        memory = torch.zeros(x.untyped_storage().nbytes() // x.element_size(), dtype=torch.int64, device=x.device)
        memory.as_strided(x.shape, x.stride(), x.storage_offset()).copy_(layer)
        made = tight(memory.as_strided(out.shape, out.stride(), out.storage_offset()).clone())
        if made is not None:
            kept.append(made)
    return [tuple(kept)]


def gated(run: Run, call: Call) -> list[Layers]:
    """``glu``: the second half of the channels gates the first."""
    x, out = call.inputs[0], call.outputs[0]
    axis = call.argument(1, "dim", -1) % x.dim()
    half = x.shape[axis] // 2
    parts = []
    for start in (0, half):
        parts.append(tuple(t for v in run.layers(x) if (t := tight(v.narrow(axis, start, half))) is not None))
    first, second = (x.narrow(axis, start, half) for start in (0, half))
    return [run.combine([(first, parts[0]), (second, parts[1])], out.shape, call.where)]


_SAME = ("clone", "contiguous", "detach", "alias", "lift_fresh", "lift", "_to_copy", "to", "view_as", "_conj")


def unchanged(run: Run, call: Call) -> list[Layers]:
    """A copy."""
    return [run.layers(call.inputs[0])]


RULES = {
    **dict.fromkeys(_SAME, unchanged),
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias", "unflatten", "flatten"), reshaped),
    **dict.fromkeys(("permute", "transpose", "t", "unsqueeze", "movedim", "numpy_T"), moved),
    **dict.fromkeys(("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "chunk"), split),
    **dict.fromkeys(("slice", "narrow"), sliced),
    **dict.fromkeys(("select", "unbind"), selected),
    **dict.fromkeys(("index", "index_select"), indexed),
    **dict.fromkeys(_POSITIONAL, by_position),
    "squeeze": squeezed,
    "flip": flipped,
    "pixel_unshuffle": moved,
    **dict.fromkeys(("pixel_shuffle", "channel_shuffle", "native_channel_shuffle"), shuffled),
    "cat": concatenated,
    "stack": stacked,
    "constant_pad_nd": padded,
    "expand": expanded,
    "repeat": repeated,
    "as_strided": strided,
    "glu": gated,
}
