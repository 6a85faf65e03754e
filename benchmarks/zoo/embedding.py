"""Is a pruned network what is left of the dense one, and nothing else?

A judge that knows no groups, so it serves for any host. Every tensor of the pruned network must be a part of the dense
tensor of the same name; where it lies follows from the values. Put back in their places, with zeros around, the parts
make the *masked* network: the dense one with the removed channels dead wherever they are made and wherever they are
read. Both must give the same output. Norms over channels take their mean and variance over the channels that are left.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tp_importance.core.batches import tensors_in

EXACT, ROUNDED = 1e-5, 1e-3
"""Largest difference allowed in float64, and in float32 where the network does not run in float64."""
TRIED = 16
"""Entries of a tensor, until one stands alone in the dense one."""
Kept = tuple[Tensor, ...]
"""Positions that are left, along each axis."""


class Foreign(ValueError):
    """A tensor of the pruned network is no part of the dense one."""


def difference(dense: nn.Module, pruned: nn.Module, run: Callable[[nn.Module], Any]) -> str | None:
    """How the pruned network differs from the masked one; None if it does not.

    Args:
        dense: the network before, with values that are distinct within each tensor.
        pruned: the network after; neither is changed.
        run: ``run(model)`` gives its output; inputs may be asked for in the precision of the model.
    """
    try:
        masked = embedded(dense, pruned)
    except Foreign as error:
        return str(error)
    with torch.no_grad():
        try:
            outs = [tensors_in(run(copy.deepcopy(model).double())) for model in (masked, pruned)]
            tolerance = EXACT
        except Exception:  # some networks make float32 tensors on their way
            outs = [tensors_in(run(model)) for model in (masked, pruned)]
            tolerance = ROUNDED
    return compared(*outs, tolerance)


def compared(expected: list[Tensor], found: list[Tensor], tolerance: float) -> str | None:
    """How outputs differ, relative to their largest value; None if they do not."""
    if len(expected) != len(found):
        return f"{len(found)} outputs instead of {len(expected)}"
    for i, (a, b) in enumerate(zip(expected, found, strict=True)):
        if a.shape != b.shape:
            return f"output {i} has shape {tuple(b.shape)} instead of {tuple(a.shape)}"
        if not a.numel():
            continue
        off = float((a.double() - b.double()).abs().max() / a.double().abs().max().clamp(min=1e-12))
        if not off <= tolerance:  # NaN, too
            return f"output {i} is off by {off:.2g} of its largest value"
    return None


def in_precision(inputs: Any, model: nn.Module) -> Any:
    """Floating inputs in the precision of the model."""
    like = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return tree_map(lambda v: v.to(like) if isinstance(v, Tensor) and v.is_floating_point() else v, inputs)


def embedded(dense: nn.Module, pruned: nn.Module) -> nn.Module:
    """A copy of the dense network with zeros for all that the pruned one has lost.

    Raises:
        Foreign: if it has other tensors, or values that are not found in order.
    """
    masked, left = copy.deepcopy(dense), dict(_tensors(pruned))
    whole = dict(_tensors(masked))
    if left.keys() != whole.keys():
        raise Foreign(f"it has other tensors: {', '.join(sorted(left.keys() ^ whole.keys())[:3])}")
    places = {name: _places(whole[name], left[name]) for name in whole if whole[name].shape != left[name].shape}
    for name in [name for name, found in places.items() if found is None]:
        places[name] = _as_sibling(name, whole, left, places)
    with torch.no_grad():
        for name, tensor in whole.items():
            values, kept = left[name].detach().clone(), places.get(name)
            if kept is None:
                tensor.copy_(values)
                continue
            if not torch.equal(_selected(tensor, kept), values):
                raise Foreign(f"{name} is no part of the dense tensor")
            tensor.copy_(_put_back(tensor, values, kept))
    _norms_over_kept(masked, pruned, places)
    return masked


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _selected(whole: Tensor, kept: Kept) -> Tensor:
    for axis, positions in enumerate(kept):
        if len(positions) < whole.shape[axis]:
            whole = whole.index_select(axis, positions)
    return whole


def _put_back(whole: Tensor, part: Tensor, kept: Kept) -> Tensor:
    """``part`` in its places, zeros elsewhere."""
    for axis, positions in enumerate(kept):
        if len(positions) < whole.shape[axis]:
            wider = part.new_zeros(*part.shape[:axis], whole.shape[axis], *part.shape[axis + 1 :])
            part = wider.index_copy_(axis, positions, part)
    return part


def _places(whole: Tensor, part: Tensor) -> Kept | None:
    """Positions along each axis whose product holds ``part``; None where values repeat themselves too often.

    One entry of ``part`` is looked for everywhere, the others along the lines through it. Where a value stands twice in
    a line, the slices behind it decide. That all other entries agree is for the caller to see.
    """
    whole, part = whole.detach(), part.detach()
    origin = None if whole.ndim != part.ndim else _origin(whole, part)
    if origin is None:
        return None
    here, there = origin
    same = []  # per axis, (part, whole): whether a position of the one may be that of the other
    for axis in range(whole.ndim):
        others = [[v for i, v in enumerate(at) if i != axis] for at in (here, there)]
        lines = [t.movedim(axis, -1)[tuple(at)] for t, at in zip((part, whole), others, strict=True)]
        same.append(lines[0][:, None] == lines[1][None, :])
    for axis, table in enumerate(same):
        for position in (table.sum(1) > 1).nonzero().flatten().tolist():
            for candidate in table[position].nonzero().flatten().tolist():
                table[position, candidate] = _slices_agree(whole, part, axis, candidate, position, same)
    if not all(bool((table.sum(1) == 1).all()) for table in same):
        return None
    return tuple(table.int().argmax(1) for table in same)


def _origin(whole: Tensor, part: Tensor) -> tuple[list[int], list[int]] | None:
    """Coordinates of an entry of ``part``, in both tensors; None if none of the first ones stands alone."""
    for entry in range(min(part.numel(), TRIED)):
        found = (whole == part.flatten()[entry]).flatten().nonzero()
        if len(found) == 1:
            at = [torch.unravel_index(torch.tensor(i), t.shape) for i, t in ((entry, part), (int(found), whole))]
            return [int(v) for v in at[0]], [int(v) for v in at[1]]
    return None


def _slices_agree(whole: Tensor, part: Tensor, axis: int, candidate: int, position: int, same: list[Tensor]) -> bool:
    """Whether two slices are equal wherever the positions along the other axes are known."""
    a, b = whole.select(axis, candidate), part.select(axis, position)
    for i, table in enumerate(table for j, table in enumerate(same) if j != axis):
        known = (table.sum(1) == 1).nonzero().flatten()
        a, b = a.index_select(i, table[known].int().argmax(1)), b.index_select(i, known)
    return a.ndim > 0 and torch.equal(a, b)


def _as_sibling(name: str, whole: dict[str, Tensor], left: dict[str, Tensor], places: dict[str, Kept | None]) -> Kept:
    """The first axis of another tensor of the same module, for vectors whose values repeat themselves."""
    module = name.rpartition(".")[0]
    for other, kept in places.items():
        same = other.rpartition(".")[0] == module and kept is not None and left[name].ndim == 1
        if same and (len(whole[other]), len(left[other])) == (len(whole[name]), len(left[name])):
            assert kept is not None
            return kept[:1]
    raise Foreign(f"the values of {name} are not found in the dense tensor")


class KeptNorm(nn.Module):
    """A norm over channels that only sees those that are left."""

    def __init__(self, norm: nn.Module, kept: Tensor, dim: int) -> None:
        super().__init__()
        self.norm, self.dim = norm, dim
        self.register_buffer("kept", kept)

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x).index_copy_(self.dim, self.kept, self.norm(x.index_select(self.dim, self.kept)))


def _norms_over_kept(masked: nn.Module, pruned: nn.Module, places: dict[str, Kept | None]) -> None:
    for name, norm in list(masked.named_modules()):
        kept = places.get(f"{name}.weight")
        if kept is None or not isinstance(norm, (nn.LayerNorm, nn.GroupNorm)):
            continue
        dim = 1 if isinstance(norm, nn.GroupNorm) or "2d" in type(norm).__name__ else -1
        masked.set_submodule(name, KeptNorm(copy.deepcopy(pruned.get_submodule(name)), kept[0], dim))
