"""What arrives at the layers of a masked network: what a pruned copy is compared with."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core.batches import tensors_in
from ..core.forward import layer_input, with_input
from ..core.untouched import untouched
from .channel_axes import channel_dim
from .comparison import StrongNeighbours
from .groups import Index, PrunableGroups
from .layer_kinds import CONV, COUNTED, is_depthwise
from .masking import masked_units

__all__ = ["MEMORY", "Reference", "Removal", "masked_pass", "read_layers"]

MEMORY = (torch.OutOfMemoryError, MemoryError)
"""Errors that say nothing about the groups."""


@dataclass(frozen=True, eq=False)
class Removal:
    """Units that go, and what they leave of the layers.

    Attributes:
        groups: the groups.
        units: that go, by group.
        kept: positions that are left of each side, ``(layer, role)``, that loses some; both sides of a depthwise
            convolution.
        widths: of these sides in the dense network.
    """

    groups: PrunableGroups
    units: Mapping[str, list[int]]
    kept: dict[tuple[str, str], Tensor] = field(init=False, default_factory=dict)
    widths: dict[tuple[str, str], int] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        modules = dict(self.groups.trace.model.named_modules())
        gone: dict[tuple[str, str], list[Index]] = defaultdict(list)
        for name, units in self.units.items():
            for m in self.groups[name].members:
                if m.axis is None and m.name in modules:
                    for role in ("in", "out") if is_depthwise(modules[m.name]) else (m.role,):
                        gone[m.name, role].append(m.positions(units))
                        self.widths[m.name, role] = m.width
        for side, positions in gone.items():
            self.kept[side] = torch.as_tensor(
                np.setdiff1d(np.arange(self.widths[side]), np.concatenate(positions)), device="cpu"
            )

    def without(self, names: Collection[str]) -> Removal:
        """The same, but all units of some groups stay."""
        return Removal(self.groups, {name: units for name, units in self.units.items() if name not in names})

    def sound(self, original: nn.Module, pruned: nn.Module) -> set[str]:
        """Layers of a pruned copy whose weights are exactly what is to be left of those of the original.

        Only plain convolutions and linear layers are looked at.
        """
        found = set()
        for (name, module), twin in zip(original.named_modules(), pruned.modules(), strict=True):
            plain = isinstance(module, (*CONV, nn.Linear)) and getattr(module, "groups", 1) == 1
            weight = module._parameters.get("weight") if plain else None
            left = twin._parameters.get("weight")
            if weight is None or left is None:
                continue
            for role, axis in (
                (("in", 0), ("out", 1)) if getattr(module, "transposed", False) else (("out", 0), ("in", 1))
            ):
                if (kept := self.kept.get((name, role))) is not None:
                    weight = weight.index_select(axis, kept.to(weight.device))
            if torch.equal(weight, left):
                found.add(name)
        return found


class Reference:
    """What arrived at the layers of a masked network, without what was masked, and what it returned.

    Attributes:
        removal: what was masked.
        inputs: by layer, one per call.
        outputs: of the network.
    """

    def __init__(self, removal: Removal) -> None:
        self.removal = removal
        self.inputs: dict[str, list[Tensor]] = defaultdict(list)
        self.outputs: list[Tensor] = []

    def add(self, name: str, module: nn.Module, x: Tensor) -> None:
        """Write the input of a call down."""
        kept = self.removal.kept.get((name, "in"))
        x = x.detach()  # and copied: what comes later may write into it
        x = x.clone() if kept is None else x.index_select(x.dim() + channel_dim(module), kept.to(x.device))
        self.inputs[name].append(x)

    def input(self, name: str, module: nn.Module, call: int, kept: Tensor | None = None) -> Tensor:
        """The input of a call on the positions ``kept``, by default all; zero where it was masked. A copy."""
        x, own = self.inputs[name][call], self.removal.kept.get((name, "in"))
        if own is None or (kept is not None and len(kept) == len(own)):
            return x.clone()  # a layer may write into it
        dim = x.dim() + channel_dim(module)
        shape = [*x.shape[:dim], self.removal.widths[name, "in"], *x.shape[dim + 1 :]]
        wide = x.new_zeros(shape).index_copy_(dim, own.to(x.device), x)
        return wide if kept is None else wide.index_select(dim, kept.to(x.device))


def read_layers(groups: PrunableGroups) -> set[str]:
    """The layers whose inputs are compared: convolutions, linear layers, and whatever else reads a group."""
    consumers = {m.name for g in groups for m in g.consumers}
    return {
        name
        for name, module in groups.trace.model.named_modules()
        if (isinstance(module, COUNTED) or name in consumers) and not isinstance(module, nn.MultiheadAttention)
    }


def masked_pass(
    model: nn.Module, removal: Removal, gated: PrunableGroups, layers: Iterable[str], run: Callable[[nn.Module], Any]
) -> Reference:
    """Run the network with its units masked, and write down what arrives at the layers.

    Args:
        model: the network.
        removal: what is masked.
        gated: groups that say where; ``removal.groups`` unless an error is planted.
        layers: whose inputs to write down.
        run: runs the network.
    """
    reference, planted = Reference(removal), gated is not removal.groups

    def note(name: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        x = layer_input(args, kwargs)
        if not isinstance(x, Tensor):
            return None
        reference.add(name, module, x)
        if not planted or (name, "in") not in removal.kept:
            return None
        # so that a planted error does not travel either: the layer sees what the pruned copy will see
        return with_input(args, kwargs, reference.input(name, module, -1))

    with untouched(model), masked_units(model, gated, removal.units), StrongNeighbours(), ExitStack() as stack:
        model.eval()
        for name in layers:
            module = model.get_submodule(name)  # after the masks
            stack.callback(module.register_forward_pre_hook(partial(note, name), with_kwargs=True).remove)
        reference.outputs = [t.detach() for t in tensors_in(run(model))]
    return reference
