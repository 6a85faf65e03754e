"""Means, variances and norms over channels, taken over those that are left.

The pruned network runs first, and the inputs of all its reductions are kept. The masked network runs the same code, so
its reductions come in the same order. Where one has an input that is wider along an axis that it reduces, the slices
that the pruned network has are found by their values, and the reduction sees only these. What the norms are called, and
whether they are modules or written out, makes no difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Handler = Callable[[str, Any, tuple[Any, ...], dict[str, Any]], Any]
Kept = Mapping[int, Tensor]
"""Positions that are left, by axis."""
Anchor = dict[int, int]
Known = Mapping[int, Sequence[Tensor]]
"""By axis, further values of each slice, of the whole and of the part."""

PLAIN = ("mean", "var", "std", "var_mean", "std_mean", "linalg_vector_norm", "norm")
LAYERWISE = ("native_layer_norm", "_fused_rms_norm")
GROUPWISE = "native_group_norm"
MOST_ROWS = 256
"""Slices that are searched one by one where each has lost other channels."""
MOST_ANCHORS = 16
"""Places tried for one entry."""
TINY = 1e-12


class Foreign(ValueError):
    """The pruned network holds or computes what is no part of the dense one."""


@dataclass(frozen=True)
class Reduction:
    """One call: the operation, the tensor that it reduces, and its weights per channel."""

    op: str
    x: Tensor
    weights: tuple[Tensor, ...]

    @classmethod
    def of(cls, op: str, args: tuple[Any, ...]) -> Reduction:
        last = args[1:3] if op == GROUPWISE else args[2:4] if op in LAYERWISE else ()
        return cls(op, args[0].detach().clone(), tuple(t.detach() for t in last if isinstance(t, Tensor)))

    @property
    def channels(self) -> int:
        """The axis that the weights belong to."""
        return 1 if self.op == GROUPWISE else self.x.dim() - 1


def recorded(run: Callable[[], Any]) -> tuple[Any, list[Reduction]]:
    """The result of ``run()``, and the reductions in it."""
    calls: list[Reduction] = []

    def keep(op: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        calls.append(Reduction.of(op, args))
        return func(*args, **kwargs)

    return _intercepted(run, keep), calls


def over_kept(run: Callable[[], Any], calls: list[Reduction], tolerance: float) -> Any:
    """The result of ``run()`` with all reductions over the channels that those of the pruned network have.

    Args:
        run: runs the masked network.
        calls: of the pruned one.
        tolerance: largest difference between values that are the same, relative to the largest one.

    Raises:
        Foreign: if there are other reductions, or if what the pruned network reduces is no part of what this one does.
    """
    left = iter(calls)

    def narrowed(op: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = next(left, None)
        if call is None or call.op != op or call.x.dim() != args[0].dim():
            raise Foreign(f"it computes {call.op if call else 'nothing'} where the dense network computes {op}")
        reduced = _reduced(op, args, kwargs)
        if all(args[0].shape[axis] == call.x.shape[axis] for axis in reduced):
            return func(*args, **kwargs)
        try:
            return _over_part(func, args, kwargs, Reduction.of(op, args), call, reduced, tolerance)
        except Foreign:
            raise Foreign(f"what its {op} reduces is no part of what the dense one does") from None

    out = _intercepted(run, narrowed)
    if next(left, None) is not None:
        raise Foreign("it computes more means, variances and norms than the dense network")
    return out


def _intercepted(run: Callable[[], Any], handler: Handler) -> Any:
    class Reductions(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            op, kwargs = func.overloadpacket.__name__, kwargs or {}
            if op in (*PLAIN, *LAYERWISE, GROUPWISE) and args[0].is_floating_point():
                return handler(op, func, args, kwargs)
            return func(*args, **kwargs)

    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it hides the norms of nn.TransformerEncoderLayer
    try:
        with Reductions():
            return run()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _reduced(op: str, args: Any, kwargs: Any) -> list[int]:
    """Axes over which a call takes its statistics."""
    n = args[0].dim()
    if op == GROUPWISE:
        return list(range(1, n))
    if op in LAYERWISE:
        return list(range(n - len(args[1]), n))
    place = 2 if op in ("linalg_vector_norm", "norm") else 1
    dims = kwargs.get("dim", args[place] if len(args) > place else None)
    dims = [dims] if isinstance(dims, int) else dims
    return [d % n for d in dims] if dims else list(range(n))


def _over_part(
    func: Any, args: Any, kwargs: Any, call: Reduction, part: Reduction, reduced: list[int], tolerance: float
) -> Any:
    kept = _where(call, part, tolerance)
    if call.op in PLAIN and kept is None:
        return func(_row_by_row(call.x, part.x, reduced, tolerance), *args[1:], **kwargs)
    if kept is None:
        raise Foreign
    if call.op == GROUPWISE:
        return _group_norm(args, kept)
    kept = {axis: at for axis, at in kept.items() if axis in reduced}
    if call.op in PLAIN:
        return func(selected(args[0], kept), *args[1:], **kwargs)
    inner = {axis - reduced[0]: at for axis, at in kept.items()}
    rest = [selected(t, inner) if isinstance(t, Tensor) else t for t in args[2:]]
    y, *statistics = func(selected(args[0], kept), [part.x.shape[axis] for axis in reduced], *rest, **kwargs)
    return put_back(y, args[0].shape, kept), *statistics


def _group_norm(args: Any, kept: Kept) -> Any:
    """Every norm group of the dense network over what is left of it; nothing where nothing is."""
    x, weight, bias, n, channels, _, groups, eps = args
    if set(kept) != {1}:
        raise Foreign
    y, ones = torch.zeros_like(x), [1] * (x.dim() - 2)
    mean, rstd = x.new_zeros(n, groups), x.new_zeros(n, groups)
    for group in range(groups):
        at = kept[1][kept[1] // (channels // groups) == group]
        if len(at):
            values = x.index_select(1, at).flatten(1)
            variance, mean[:, group] = torch.var_mean(values, 1, correction=0)
            rstd[:, group] = (variance + eps).rsqrt()
            values = (values - mean[:, group, None]) * rstd[:, group, None]
            y.index_copy_(1, at, values.view(n, len(at), *x.shape[2:]))
    y = y if weight is None else y * weight.view(-1, *ones)
    y = y if bias is None else y + bias.view(-1, *ones)
    return put_back(y.index_select(1, kept[1]), x.shape, kept), mean, rstd


def _row_by_row(x: Tensor, part: Tensor, reduced: list[int], tolerance: float) -> Tensor:
    """The part of ``x`` where each slice along an axis that is not reduced, a norm group say, has lost other channels.

    Raises:
        Foreign: if there is no such axis.
    """
    for axis in (a for a in range(x.dim()) if a not in reduced and x.shape[a] == part.shape[a] <= MOST_ROWS):
        rows = []
        for whole, left in zip(x.unbind(axis), part.unbind(axis), strict=True):
            kept = positions(whole, left, tolerance)
            if kept is None:
                break
            rows.append(selected(whole, kept))
        else:
            return torch.stack(rows, axis)
    raise Foreign


def selected(x: Tensor, kept: Kept) -> Tensor:
    """The entries of ``x`` at the positions that are left."""
    for axis, at in kept.items():
        x = x.index_select(axis, at)
    return x


def put_back(part: Tensor, shape: Sequence[int], kept: Kept) -> Tensor:
    """``part`` in its places, zeros elsewhere."""
    for axis, at in kept.items():
        wider = part.new_zeros(*part.shape[:axis], shape[axis], *part.shape[axis + 1 :])
        part = wider.index_copy_(axis, at, part)
    return part


def _where(whole: Reduction, part: Reduction, tolerance: float) -> dict[int, Tensor] | None:
    """Positions of what one call reduces in what the other does; weights of a channel count as further values of it."""
    known = {}
    if part.weights and all(t.dim() == 1 for t in part.weights):
        scales = [t.abs().max().clamp(min=TINY) for t in part.weights]
        columns = [[t / scale for t, scale in zip(c.weights, scales, strict=True)] for c in (whole, part)]
        known = {whole.channels: [torch.stack(c, 1) for c in columns]}
    return positions(whole.x, part.x, tolerance, known)


def positions(whole: Tensor, part: Tensor, tolerance: float, known: Known | None = None) -> dict[int, Tensor] | None:
    """Where ``part`` lies, along the axes where it is shorter; None if it is no part.

    Of slices with equal values the first one is taken: to a mean it is the same which one it is.

    Args:
        whole: any shape.
        part: as many axes.
        tolerance: largest difference, relative to the largest value.
        known: by axis, further values of each of its slices, of ``whole`` and of ``part``.
    """
    if not part.numel() or any(a < b for a, b in zip(whole.shape, part.shape, strict=True)):
        return None
    shorter = [axis for axis in range(whole.dim()) if whole.shape[axis] > part.shape[axis]]
    scale = float(part.abs().max()) or 1.0
    whole, part = whole / scale, part / scale
    for there, here in _anchors(whole, part, shorter, tolerance):
        kept = {}
        for axis in shorter:
            tables = [_slices(t, axis, at) for t, at in ((whole, there), (part, here))]
            if known and axis in known:
                tables = [torch.cat(pair, 1) for pair in zip(tables, known[axis], strict=True)]
            kept[axis] = _nearest(*tables)
        if bool(((selected(whole, kept) - part).abs() <= tolerance).all()):
            return kept
    return None


def _anchors(whole: Tensor, part: Tensor, axes: list[int], tolerance: float) -> Iterator[tuple[Anchor, Anchor]]:
    """Where an entry of ``part`` may lie in ``whole``, along some axes; nothing has to be known of a single one."""
    if len(axes) < 2:
        yield {}, {}
        return
    here = torch.unravel_index(part.abs().argmax(), part.shape)
    same = ((whole - part[here]).abs() <= tolerance).nonzero()
    for there in same[:MOST_ANCHORS].tolist():
        yield {a: there[a] for a in axes}, {a: int(here[a]) for a in axes}


def _slices(x: Tensor, axis: int, at: Anchor) -> Tensor:
    """A row of values for each position along an axis, the others being fixed where ``at`` says."""
    for other in sorted(at, reverse=True):
        if other != axis:
            x = x.narrow(other, at[other], 1)
    return x.movedim(axis, 0).flatten(1)


def _nearest(whole: Tensor, part: Tensor) -> Tensor:
    """For each row of ``part`` the nearest one of ``whole``, no row twice."""
    far = torch.cdist(part.double(), whole.double())
    found = far.argmin(1)
    if len(found.unique()) < len(found):
        for row in range(len(part)):
            found[row] = far[row].argmin()
            far[:, found[row]] = torch.inf
    return found
