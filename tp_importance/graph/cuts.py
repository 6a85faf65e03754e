"""Cuts: what surgery takes from single modules and tensors, and how that is done without any graph.

A cut names one side of one module, one axis of one parameter or buffer, or one whole number that a module holds. The
modules are cut by Torch-Pruning's functions, the user's and ours, see :class:`.layer_pruners.LayerPruners`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .groups import ChannelGroup, Member
from .layer_pruners import LayerPruners

__all__ = ["Cut", "Scaling", "cuts_of", "holders", "make_cuts", "owner_of", "scalings_of"]


@dataclass(frozen=True)
class Cut:
    """Positions that go from one place.

    Attributes:
        name: qualified name of the module, of the parameter or buffer, or of the number, see
            :attr:`.groups.ChannelGroup.attributes`.
        side: ``"out"`` or ``"in"`` of a module, the axis of a parameter or buffer, ``"attribute"`` for a number: it
            falls by one per position.
        positions: what goes, ascending.
        width: entries there before; ``None`` if nobody has counted them.
    """

    name: str
    side: Literal["out", "in", "attribute"] | int
    positions: tuple[int, ...]
    width: int | None = None

    def __str__(self) -> str:
        if self.side == "attribute":
            return f"attribute {self.name}"
        return f"axis {self.side} of {self.name}" if isinstance(self.side, int) else f"{self.side}puts of {self.name}"


def cuts_of(plan: Sequence[tuple[ChannelGroup, Sequence[int]]], model: nn.Module, pruners: LayerPruners) -> list[Cut]:
    """Everything that goes with some units: one cut per module side, tensor axis and number.

    Args:
        plan: groups and the units of each that go.
        model: the network they are cut from.
        pruners: of its modules.
    """
    gone: dict[tuple[str, Any], set[int]] = defaultdict(set)
    widths: dict[tuple[str, Any], int] = {}
    names: dict[nn.Module, str] = {}

    def add(member: Member, side: Any, units: Sequence[int]) -> None:
        positions = member.positions(units).tolist()
        name, counted = member.name, side
        if side in ("out", "in") and positions:
            module = model.get_submodule(name)
            name = names.setdefault(module, name)
            side, positions = pruners.on_one_side(module, side, positions)
        gone[name, side].update(positions)
        if side == counted:
            widths[name, side] = member.width

    for group, units in plan:
        for member in group.members:
            add(member, member.role if member.axis is None else member.axis, units)
        for member in group.attributes:
            add(member, "attribute", units)
    return [Cut(*key, tuple(sorted(found)), widths.get(key)) for key, found in gone.items() if found]


@dataclass(frozen=True)
class Scaling:
    """Filters that are multiplied by a number before anything is cut.

    Attributes:
        name: qualified name of their layer.
        rows: the filters, ascending.
        factor: the number.
    """

    name: str
    rows: tuple[int, ...]
    factor: float


def scalings_of(groups: Iterable[ChannelGroup], cuts: Sequence[Cut]) -> list[Scaling]:
    r"""Queries that make up for a scale :math:`1/\sqrt{d}` of their products with keys that the code computes anew.

    Of d dimensions d' are left, so all are multiplied by :math:`\sqrt{d'/d}`, whichever groups they are of.

    Args:
        groups: all groups before the cuts.
        cuts: what is cut.
    """
    gone = {cut.name: set(cut.positions) for cut in cuts if cut.side == "out"}
    attending = {  # groups that share the dimensions of an attention name the same filters
        tuple((m.name, m.channels.tobytes()) for m in queries.filters): queries.filters
        for group in groups
        for queries in group.queries
    }
    found = []
    for filters in attending.values():
        rows = {m.name: m.channels.tolist() for m in filters}
        lost = sum(len(gone.get(name, set()).intersection(own)) for name, own in rows.items())
        left = 1 - lost / sum(map(len, rows.values()))
        if 0 < left < 1:
            found += [Scaling(name, tuple(own), math.sqrt(left)) for name, own in rows.items()]
    return found


def make_cuts(
    model: nn.Module,
    cuts: Sequence[Cut],
    pruners: LayerPruners,
    part: nn.Module | None = None,
    scalings: Sequence[Scaling] = (),
) -> None:
    """Cut a network, in place.

    A tensor that several modules share is cut once and stays shared. Parameters keep their gradient flags, what they
    are laid out like and their gradients are the business of :func:`.surgery.settled`.

    Args:
        model: the network.
        cuts: see :func:`cuts_of`; at most one per place.
        pruners: of its modules.
        part: holds the modules that these cuts can change, and those that hold the same tensors and lists of numbers;
            all, if not given.
        scalings: what is multiplied beforehand.

    Raises:
        ValueError: if a cut names something that the network does not have, or takes all of it; nothing is cut then.
        RuntimeError: if a module has another width than it should have before or afterwards, if none is known that
            could cut it, or if modules that share a tensor lose different parts of it.
    """
    calls = [_call(model, cut, pruners) for cut in cuts]
    modules = {call.owner for call in calls if isinstance(call, _ModuleCall)}
    shared = _Shared(model if part is None else part, pruners, modules)
    for scaling in scalings:
        _scale(model.get_submodule(scaling.name), scaling, shared)
    for call in calls:
        call.run(shared)
    shared.tie()


def _scale(layer: nn.Module, scaling: Scaling, shared: _Shared) -> None:
    """Multiply some filters and their biases.

    Raises:
        RuntimeError: if the weight is computed from others.
    """
    for leaf in ("weight", "bias"):
        old = layer._parameters.get(leaf)
        if old is None:
            if isinstance(getattr(layer, leaf, None), Tensor):
                raise RuntimeError(f"{scaling.name}.{leaf} is computed from other tensors and cannot be multiplied")
            continue
        new = old.detach().clone()
        rows = torch.tensor(scaling.rows, device=old.device)
        new[rows] = new[rows] * scaling.factor
        shared.replace(old, nn.Parameter(new, requires_grad=old.requires_grad), layer)


@dataclass
class _ModuleCall:
    cut: Cut
    owner: nn.Module
    pruner: Any

    def width(self) -> int | None:
        count = self.pruner.get_out_channels if self.cut.side == "out" else self.pruner.get_in_channels
        width = count(self.owner)
        return None if width is None else int(width)

    def run(self, shared: _Shared) -> None:
        cut, before = self.cut, self.width()
        function = self.pruner.prune_out_channels if cut.side == "out" else self.pruner.prune_in_channels
        function(self.owner, list(cut.positions))
        after = self.width()
        if after is None and isinstance(self.owner, nn.PReLU):  # of a single parameter Torch-Pruning says no width
            after = self.owner.num_parameters
        if before is not None and after != before - len(cut.positions):
            raise RuntimeError(f"{after} {cut} are left, not {before - len(cut.positions)}")


@dataclass
class _TensorCall:
    cut: Cut
    owner: nn.Module
    leaf: str

    def width(self) -> int:
        assert isinstance(self.cut.side, int)
        return int(self._tensor().shape[self.cut.side])

    def _tensor(self) -> Tensor:
        return dict(_own(self.owner))[self.leaf]

    def run(self, shared: _Shared) -> None:
        assert isinstance(self.cut.side, int)
        old, width = self._tensor(), self.width()
        gone = set(self.cut.positions)
        keep = torch.tensor([i for i in range(width) if i not in gone], dtype=torch.int64, device=old.device)
        new: Tensor = old.detach().index_select(self.cut.side, keep)
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        shared.replace(old, new, self.owner)


@dataclass
class _NumberCall:
    cut: Cut
    owner: nn.Module
    key: str
    index: int | None = None  # in a list or tuple

    def __post_init__(self) -> None:
        self._before = self.width()

    def width(self) -> int:
        value: Any = getattr(self.owner, self.key)
        value = value if self.index is None else value[self.index]
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{self.cut} is no whole number but {value!r}")
        return value

    def run(self, shared: _Shared) -> None:
        # what cuts the module may have set it already
        new, old = self._before - len(self.cut.positions), getattr(self.owner, self.key)
        if self.index is None:
            setattr(self.owner, self.key, new)
            return
        changed = type(old)([*old[: self.index], new, *old[self.index + 1 :]])
        setattr(self.owner, self.key, changed)
        # a list is not written into, for a surgery that fails puts back what the modules held: whoever held it follows
        for module, key in holders(shared.part, old) if isinstance(old, list) else ():
            setattr(module, key, changed)


_Call = _ModuleCall | _TensorCall | _NumberCall


def _call(model: nn.Module, cut: Cut, pruners: LayerPruners) -> _Call:
    """Who makes a cut; it is checked against the network as it is."""
    try:
        call = _found(model, cut, pruners)
        width = call.width()
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"the network has no {cut}") from error
    if cut.width is not None and width not in (None, cut.width):
        raise RuntimeError(f"there are {width} {cut}, not {cut.width}: the groups are of another network")
    if width is not None and cut.positions and not 0 <= cut.positions[0] <= cut.positions[-1] < width:
        raise ValueError(f"there are {width} {cut}; {list(cut.positions)} cannot go")
    if width is not None and len(cut.positions) >= width:
        raise ValueError(f"all {width} {cut} were to go")
    return call


def _found(model: nn.Module, cut: Cut, pruners: LayerPruners) -> _Call:
    if cut.side in ("out", "in"):
        module = model.get_submodule(cut.name)
        pruner = pruners.of(module)
        if pruner is None:
            raise RuntimeError(f"no pruning function is known for {cut.name} ({type(module).__name__})")
        return _ModuleCall(cut, module, pruner)
    name = owner_of(model, cut)
    owner, rest = model.get_submodule(name), cut.name[len(name) + bool(name) :]
    if isinstance(cut.side, int):
        return _TensorCall(cut, owner, rest)
    key, *index = rest.split(".")
    return _NumberCall(cut, owner, key, *map(int, index))


def holders(part: nn.Module, value: Any) -> list[tuple[nn.Module, str]]:
    """Modules with the names of their attributes that are an object."""
    return [(module, key) for module in part.modules() for key, held in vars(module).items() if held is value]


def owner_of(model: nn.Module, cut: Cut) -> str:
    """Name of the module that a cut changes.

    Raises:
        AttributeError: if the network has no such module.
    """
    parts = cut.name.split(".")
    if cut.side in ("out", "in"):
        model.get_submodule(cut.name)
        return cut.name
    if isinstance(cut.side, int):
        model.get_submodule(".".join(parts[:-1]))
        return ".".join(parts[:-1])
    depth, owner = 0, model
    while depth < len(parts) - 1 and parts[depth] in owner._modules:
        owner, depth = owner.get_submodule(parts[depth]), depth + 1
    return ".".join(parts[:depth])


class _Shared:
    """Where every tensor is registered, so that those which several modules share stay shared.

    Args:
        part: the modules that may hold them, before anything is cut.
        pruners: of its modules.
        cut: modules that a pruning function cuts; it gives them tensors of their own.
    """

    def __init__(self, part: nn.Module, pruners: LayerPruners, cut: set[nn.Module]) -> None:
        self.part, self._pruners, self._cut = part, pruners, cut
        self._places: dict[int, list[tuple[nn.Module, str, str]]] = defaultdict(list)
        self._alone: dict[int, Tensor] = {}  # those that no pruning function has made
        self._tensors: dict[int, Tensor] = {}  # kept alive: their ids must stay theirs
        for name, module in part.named_modules():
            for leaf, tensor in _own(module):
                self._places[id(tensor)].append((module, leaf, f"{name}.{leaf}".lstrip(".")))
                self._tensors[id(tensor)] = tensor

    def replace(self, old: Tensor, new: Tensor, owner: nn.Module) -> None:
        """Put a tensor in the place of another, in its owner and wherever no pruning function does."""
        self._alone[id(new)] = new
        for module in self.part.modules():
            if module is owner or module not in self._cut:
                for leaf, tensor in _own(module):
                    if tensor is old:
                        setattr(module, leaf, new)

    def tie(self) -> None:
        """Make one tensor again of those that were one.

        Raises:
            RuntimeError: if they differ.
        """
        for key, places in self._places.items():
            if len(places) == 1:
                continue
            now = [dict(_own(module)).get(leaf) for module, leaf, _ in places]
            new = [t for t in now if t is not None and t is not self._tensors[key]]
            if not new:
                continue
            stale = not any(id(t) in self._alone for t in new) and any(
                t is self._tensors[key] and self._pruners.of(module) is not None
                for t, (module, _, _) in zip(now, places, strict=True)
            )
            if stale or not all(_same(t, new[0]) for t in new):
                raise RuntimeError(f"{' and '.join(p[2] for p in places)} are one tensor and lose different parts")
            for module, leaf, _ in places:
                setattr(module, leaf, new[0])


def _own(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for registry in (module._parameters, module._buffers):
        yield from [(leaf, tensor) for leaf, tensor in registry.items() if tensor is not None]


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same number by number; NaN is NaN."""
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
