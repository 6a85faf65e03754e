"""Is a pruned network what is left of the dense one, and nothing else?

A judge that knows no groups, so it serves for any host. Every tensor of the pruned network must be a part of the dense
tensor of the same name; where it lies follows from the values. With zeros everywhere else the dense tensors make the
*masked* network: the removed channels are dead wherever they are made and wherever they are read. Both must give the
same output. Means, variances and norms over channels are those of the channels that are left (see
:mod:`benchmarks.zoo.norms`).

A head that is gone is one whose queries, keys, values and columns of the output projection are zero. Where dimensions
of all heads are gone, the queries may have a factor: networks scale the products of queries and keys by the size of
their heads, and pruning makes up for the new size. The masked network has the dense weights and the old size, so a
wrong factor shows in the output.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from benchmarks.zoo.norms import Foreign, over_kept, put_back, recorded, selected
from tp_importance.core.batches import tensors_in

EXACT, ROUNDED = 1e-6, 1e-3
"""Largest difference allowed in float64, and in float32 where the network does not run in float64."""
TRIED = 16
"""Entries of a tensor, until one stands alone in the dense one."""
SAME = 1e-6
"""Largest relative difference between two factors that are one."""
PARALLEL = 1e-9
"""Largest difference of a cosine from 1 where two rows are multiples of each other."""
Kept = tuple[Tensor, ...]
"""Positions that are left, along each axis."""


def difference(dense: nn.Module, pruned: nn.Module, run: Callable[[nn.Module], Any]) -> str | None:
    """How the pruned network differs from the masked one; None if it does not.

    Args:
        dense: the network before, with values that are distinct within each tensor.
        pruned: the network after; neither is changed.
        run: ``run(model)`` gives its output; inputs may be asked for in the precision of the model.
    """
    try:
        masked = embedded(dense, pruned)
        try:
            models = [copy.deepcopy(model).double() for model in (masked, pruned)]
            return compared(*_outputs(*models, run, EXACT), EXACT)
        except Foreign:
            raise
        except Exception:  # some networks make float32 tensors on their way
            return compared(*_outputs(masked, pruned, run, ROUNDED), ROUNDED)
    except Foreign as error:
        return str(error)


@torch.no_grad()
def _outputs(
    masked: nn.Module, pruned: nn.Module, run: Callable[[nn.Module], Any], tolerance: float
) -> tuple[list[Tensor], list[Tensor]]:
    found, reductions = recorded(lambda: run(pruned))
    return tensors_in(over_kept(lambda: run(masked), reductions, tolerance)), tensors_in(found)


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
    shorter = [name for name in whole if whole[name].shape != left[name].shape]
    found = {name: _places(whole[name], left[name]) for name in shorter}
    places = {name: kept for name, kept in found.items() if kept is not None}
    for name in sorted(found.keys() - places.keys(), key=lambda name: (left[name].dim() < 2, shorter.index(name))):
        places[name] = _as_others(name, whole[name], left[name], whole, places)
    for name, kept in places.items():
        at = {axis: kept[axis] for axis in range(len(kept)) if len(kept[axis]) < whole[name].shape[axis]}
        values = selected(whole[name].detach(), at)
        if not _equal_up_to_a_factor(values, left[name].detach()):
            raise Foreign(f"{name} is no part of the dense tensor")
        with torch.no_grad():
            whole[name].copy_(put_back(values, whole[name].shape, at))
    return masked


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _equal_up_to_a_factor(whole: Tensor, part: Tensor) -> bool:
    """Whether values are equal, but for one factor of some rows, or of some columns."""
    if whole.shape != part.shape:
        return False
    if torch.equal(whole, part):
        return True
    return part.is_floating_point() and any(_one_factor(whole, part, axis) for axis in range(min(part.dim(), 2)))


def _one_factor(whole: Tensor, part: Tensor, axis: int) -> bool:
    """Whether values are equal, but for one factor of some of the slices along an axis."""
    a, b = (t.double().movedim(axis, 0).reshape(len(t.movedim(axis, 0)), -1) for t in (whole, part))
    factors = ((a * b).sum(1) / (a * a).sum(1)).nan_to_num(1.0)  # 0 / 0 in rows of zeros
    others = factors[(factors - 1).abs() > SAME]
    rows_agree = (b - factors[:, None] * a).abs().amax(1) <= SAME * b.abs().amax(1)
    return bool(rows_agree.all() and (others > 0).all() and ((others / others[:1] - 1).abs() <= SAME).all())


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


def _as_others(name: str, whole: Tensor, part: Tensor, tensors: dict[str, Tensor], places: dict[str, Kept]) -> Kept:
    """Positions of a tensor whose values repeat themselves, or have a factor, with the help of other tensors."""
    module, known = name.rpartition(".")[0], defaultdict(list)
    for other in sorted(places, key=lambda other: other.rpartition(".")[0] != module):  # of the same module first
        for n, at in zip(tensors[other].shape, places[other], strict=True):
            known[n, len(at)].append(at)
    whole, part = whole.detach(), part.detach()
    if whole.dim() == part.dim():
        for kept in _guesses(whole, part, known):
            if _equal_up_to_a_factor(selected(whole, dict(enumerate(kept))), part):
                return kept
    raise Foreign(f"the values of {name} are not found in the dense tensor")


def _guesses(whole: Tensor, part: Tensor, known: dict[tuple[int, int], list[Tensor]]) -> Iterator[Kept]:
    """Positions along each axis, from those of other axes of these sizes; of rows or columns, from their directions."""
    along = [
        [torch.arange(n)] if n == k else list({tuple(at.tolist()): at for at in known[n, k]}.values())
        for n, k in zip(whole.shape, part.shape, strict=True)
    ]
    if whole.dim() == 1:
        yield from ((at,) for at in along[0])
        return
    for axis in (0, 1):
        for others in product(*along[:axis], *along[axis + 1 :]):
            rest = dict(zip((a for a in range(whole.dim()) if a != axis), others, strict=True))
            found = _by_direction(selected(whole, rest).movedim(axis, 0), part.movedim(axis, 0))
            if found is not None:
                yield (*others[:axis], found, *others[axis:])


def _by_direction(whole: Tensor, part: Tensor) -> Tensor | None:
    """For each row of ``part`` the one of ``whole`` that is a multiple of it; None if there is not exactly one."""
    a, b = (nn.functional.normalize(t.double().flatten(1), dim=1) for t in (whole, part))
    same = b @ a.T > 1 - PARALLEL
    return same.int().argmax(1) if bool((same.sum(1) == 1).all()) else None
