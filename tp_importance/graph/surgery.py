"""Physical removal of units: every module that loses channels is cut by its pruning function, and nothing is traced."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core.guards import preserved, transaction
from ..core.stale_optimizers import replacing
from .cuts import Cut, Scaling, cuts_of, holders, make_cuts, owner_of, scalings_of
from .groups import ChannelGroup, PrunableGroups
from .layer_pruners import LayerPruners

__all__ = ["Cutter", "checked_units", "planned_cuts", "remove_units", "settled"]


def remove_units(
    groups: PrunableGroups, removed: Mapping[str, Sequence[int]], *, model: nn.Module | None = None
) -> list[Cut]:
    """Remove units, in place.

    Every module side is cut once, by its pruning function (Torch-Pruning's, the user's or ours), every other parameter,
    buffer or whole number that follows is set. Parameters that are cut become new objects without a gradient, in the
    memory format of the old ones; all others keep theirs. What modules share stays shared. Training modes and
    ``requires_grad`` stay as they were.

    Args:
        groups: the groups of the model as it is now.
        removed: units to remove, per group name; every group must keep at least ``min_units``.
        model: what is cut instead of the model that the groups were found on: a copy of it in the same state.

    Returns:
        What was cut.

    Raises:
        TypeError: if units are no numbers: a mask, say.
        ValueError: if a name or unit is unknown, or too few units would be left.
        RuntimeError: if not exactly what was asked for is gone: the groups are of another network, say.

    Example:
        >>> from tp_importance import prunable_groups
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 3))
        >>> groups = prunable_groups(net, torch.zeros(1, 3, 8, 8))
        >>> [str(cut) for cut in remove_units(groups, {"0": [1, 5]})], net[2].in_channels
        (['outputs of 0', 'outputs of 1', 'inputs of 2'], 6)
    """
    model, pruners, cuts = planned_cuts(groups, removed, model)
    Cutter(model, pruners).make(cuts, scalings_of(groups, cuts))
    return cuts


class Cutter:
    """Makes cuts in one network, one after the other; a cut costs as much as what it cuts, not as the network.

    Args:
        model: the network.
        pruners: of its modules.
    """

    def __init__(self, model: nn.Module, pruners: LayerPruners) -> None:
        self._model, self.pruners = model, pruners
        owners: dict[int, set[str]] = defaultdict(set)
        for name, module in model.named_modules():
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    owners[id(tensor)].add(name)
        self._sharing: dict[str, set[str]] = defaultdict(set)  # surgery keeps shared what is shared
        for names in owners.values():
            for name in names if len(names) > 1 else ():
                self._sharing[name] |= names

    @torch.inference_mode(False)  # it makes parameters
    @torch.no_grad()
    def make(self, cuts: Sequence[Cut], scalings: Sequence[Scaling] = (), *, gradients: bool = False) -> None:
        """Make cuts, all or none; an optimizer that goes on with what was replaced will warn.

        Args:
            cuts: see :func:`.cuts.cuts_of`.
            scalings: see :func:`.cuts.scalings_of`.
            gradients: cut these along, as Torch-Pruning does; else what is cut has none.

        Raises:
            ValueError: see :func:`.cuts.make_cuts`; after any exception the network is as it was.
            RuntimeError: see there.
        """
        part = self._part(cuts)
        before = dict(part.named_parameters()) if gradients else {}
        with replacing(part, type(self._model).__name__), transaction(part), preserved(part):
            with settled(part):
                make_cuts(self._model, cuts, self.pruners, part, scalings)
                kept = {name: p.grad for name, p in part.named_parameters()} if gradients else {}
            for cut in cuts if gradients else ():
                old = before.get(cut.name)
                if old is not None and old.grad is not None and isinstance(cut.side, int):
                    keep = np.delete(np.arange(old.shape[cut.side]), cut.positions)
                    kept[cut.name] = old.grad.index_select(cut.side, torch.from_numpy(keep).to(old.device))
            for name, parameter in part.named_parameters() if gradients else ():
                parameter.grad = kept[name]

    def _part(self, cuts: Sequence[Cut]) -> nn.Module:
        """The modules that cuts can change, under their names in the network."""
        names: set[str] = set()
        for cut in cuts:
            try:
                name = owner_of(self._model, cut)
            except AttributeError as error:
                raise ValueError(f"the network has no {cut}") from error
            owner = self._model.get_submodule(name)
            for inner, _ in owner.named_modules(prefix=name):
                names |= {name, *self._sharing.get(inner, ())}
            if cut.side == "attribute":  # others may hold the same list
                held = vars(owner).get(cut.name.removeprefix(f"{name}.").split(".")[0])
                kin = {module for module, _ in holders(self._model, held)} if isinstance(held, list) else set()
                names |= {n for n, module in self._model.named_modules() if module in kin}
        part = nn.Module()
        part.training = self._model.training
        part._modules.update((name, self._model.get_submodule(name)) for name in sorted(names))
        return part


def planned_cuts(
    groups: PrunableGroups, removed: Mapping[str, Sequence[int]], model: nn.Module | None = None
) -> tuple[nn.Module, LayerPruners, list[Cut]]:
    """What :func:`remove_units` would cut, with the model and its pruning functions; nothing is changed.

    Raises:
        ValueError: as there.
    """
    plan, source = checked_units(groups, removed), groups.trace.model
    model = source if model is None else model
    options = groups.options if model is source else groups.options.on_copy(source, model)
    pruners = LayerPruners(model, options.customized_pruners)
    return model, pruners, cuts_of(plan, model, pruners)


def checked_units(groups: PrunableGroups, removed: Mapping[str, Sequence[int]]) -> list[tuple[ChannelGroup, list[int]]]:
    """The groups that lose units, and these, ascending.

    Raises:
        TypeError: if units are no numbers: a mask, say.
        ValueError: if a name or unit is unknown, or too few units would be left.
    """
    plan = [(groups[name], _numbers(name, units)) for name, units in removed.items() if len(units)]
    for group, units in plan:
        if units[0] < 0 or units[-1] >= group.n_units:
            raise ValueError(f"group {group.name} has units 0..{group.n_units - 1}; {units} cannot be removed")
        if group.n_units - len(units) < group.min_units:
            raise ValueError(
                f"group {group.name} keeps at least {group.min_units} of its {group.n_units} units; "
                f"{len(units)} were to go"
            )
    return plan


def _numbers(name: str, units: Any) -> list[int]:
    """Units to remove from a group, ascending."""
    units = units.tolist() if isinstance(units, (np.ndarray, Tensor)) else list(units)
    if not all(isinstance(unit, Integral) and not isinstance(unit, bool) for unit in units):
        raise TypeError(f"removed[{name!r}] is {units}: list the numbers of the units that go")
    return sorted(set(map(int, units)))


@contextmanager
def settled(model: nn.Module) -> Iterator[None]:
    """Around a surgery: new parameters and buffers are laid out in memory as those they replace, and have no gradient.

    Torch-Pruning's functions give contiguous ones, and cut gradients along, which then look like those of the smaller
    network.

    Args:
        model: the network.

    Example:
        >>> net = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
        >>> with settled(net):
        ...     net.weight = nn.Parameter(net.weight[:2].contiguous())
        >>> net.weight.is_contiguous(memory_format=torch.channels_last)
        True
    """
    before = dict(_tensors(model))
    yield
    for name, tensor in _tensors(model):
        old = before.get(name)
        if old is None or old is tensor:
            continue
        tensor.grad = None
        layout = _LAST.get(old.dim())
        if layout is not None and tensor.dim() == old.dim() and not old.is_contiguous():
            if old.is_contiguous(memory_format=layout):
                tensor.data = tensor.data.contiguous(memory_format=layout)


_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)
