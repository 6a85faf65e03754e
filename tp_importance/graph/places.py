"""Where labels lie: sides of modules, axes of tensors, numbers that count them, and what is computed over them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from .groups import Kind, Role
from .kept_statistics import StatisticCall
from .labels.ledger import Follower, Ledger, Statistic
from .labels.reasons import Index, Reason
from .layer_kinds import CONV, is_passthrough
from .layer_pruners import (
    RECURRENT,
    LayerPruners,
    ParametrisedPruner,
    input_weights,
    loses_whole_groups,
    users_layers,
)
from .reparametrised import computed_tensors
from .trace_options import TraceOptions
from .tracing import Trace

__all__ = ["Layout", "Place", "counted", "multiplied", "normalised", "queries"]


@dataclass(frozen=True)
class Place:
    """One dimension of a module or tensor, and the class of every position; -1 where it has no label."""

    name: str
    role: Role
    kind: Kind
    classes: Index
    axis: int | None = None
    attribute: bool = False
    statistic: Statistic | None = None
    product: int | None = None
    query: int | None = None

    @property
    def is_member(self) -> bool:
        """Whether it loses entries."""
        return not self.attribute and self.statistic is None and self.product is None and self.query is None


class Layout:
    """Which dimension of which module an axis of a parameter or buffer is."""

    def __init__(self, traced: Trace, options: TraceOptions) -> None:
        self._modules = dict(traced.model.named_modules())
        self._pruners = LayerPruners(traced.model, options.customized_pruners)
        self._users = users_layers(traced.model, options.customized_pruners)
        named = dict(traced.model.named_parameters())
        shared: dict[int, list[str]] = defaultdict(list)  # an embedding and the head behind it may share their weight
        for name, tensor in traced.model.named_parameters(remove_duplicate=False):
            if name.rpartition(".")[0] in self._modules:
                shared[id(tensor)].append(name)
        self._names = {names[0]: names for names in shared.values()}
        self._ignored_tensors = {n for n, p in named.items() if any(p is q for q in options.ignored_params)}

    def places(self, ledger: Ledger, classes: Index) -> list[Place]:
        """All dimensions with labels, each once."""
        found: dict[tuple[str, str], Place] = {}
        sites = [(name, site) for site in ledger.sites for name in self._names.get(site.name, [site.name])]
        for name, site in sites:
            own = classes[site.first : site.first + site.size]
            place = self._place(name, site.axis, own)
            if place is None:
                continue
            key = (place.name, place.role)
            if key in found and place.axis is not None and found[key].axis != place.axis:
                place = replace(place, role="in")
                key = (place.name, "in")
            found.setdefault(key, place)
            module: Any = self._modules.get(place.name)
            if place.role == "out" and module is not None and loses_whole_groups(module):
                whole = place.classes.reshape(module.groups, -1)[:, 0]
                inputs = np.repeat(whole, module.in_channels // module.groups)
                found.setdefault((place.name, "in"), replace(place, role="in", classes=inputs))
        return list(found.values())

    def _place(self, name: str, axis: int, classes: Index) -> Place | None:
        owner, _, key = name.rpartition(".")
        module: Any = self._modules.get(owner)
        if owner in self._users:
            side: Role = "in" if key == "in" else "out"
            pruner = self._users[owner]
            apart = pruner.prune_in_channels != pruner.prune_out_channels
            weighted = isinstance(module, (*CONV, nn.Linear)) and apart
            return Place(owner, side, _kind(module, side) if weighted else "passthrough", classes)
        if isinstance(module, (*CONV, nn.Linear)):
            if key == "bias":
                return Place(owner, "out", _kind(module, "out"), classes)
            if key == "weight":
                role: Role = "out" if axis == int(getattr(module, "transposed", False)) else "in"
                transposed, groups = getattr(module, "transposed", False), getattr(module, "groups", 1)
                if is_passthrough(module):  # axis 0 tells of both sides
                    if axis:
                        return None
                    whole = np.repeat(classes.reshape(groups, -1)[:, 0], getattr(module, "out_channels", 0) // groups)
                    return Place(owner, "out", "passthrough", whole)
                if groups > 1 and (role == "in") != transposed:
                    classes = np.tile(classes, groups)
                return Place(owner, role, _kind(module, role), classes)
            return None
        if isinstance(module, RECURRENT):  # but for its inputs all stays
            return Place(owner, "in", "consumer", classes) if key in input_weights(module) and axis else None
        if isinstance(module, nn.Embedding) and axis == 0:  # its rows are no channels
            return None
        in_one = len(getattr(module, "normalized_shape", ())) < 2  # else its tensors are cut one by one
        if module is not None and in_one and self._pruners.of(module) is not None:
            return Place(owner, "out", "passthrough", classes)
        return Place(name, "out", "passthrough", classes, axis) if len(classes) > 1 else None

    def reasons_of(self, place: Place, ignored: set[nn.Module]) -> Iterator[tuple[int, Reason]]:
        """Why classes must stay because of a layer."""
        module = self._modules.get(place.name)
        reason: Reason | None = None
        if place.axis is not None and place.name in self._ignored_tensors:
            reason = ("ignored", f"{place.name} is in ignored_layers")
        if module is not None and place.role == "out" and module in ignored:
            reason = ("ignored", f"{place.name} is in ignored_layers")
        fixed = None if module is None else self._computed(place.name, module, place.role)
        if fixed:
            reason = ("computed", fixed)
        if reason is not None:
            for c in np.unique(place.classes[place.classes >= 0]).tolist():
                yield c, reason

    def _computed(self, name: str, module: nn.Module, role: Role) -> str | None:
        """Why a module cannot lose channels because of what its tensors are computed from, if that is so."""
        found = computed_tensors(module)
        if not found or name in self._users:
            return None
        dense = isinstance(module, (*CONV, nn.Linear)) and not is_passthrough(module)
        found = [c for c in found if c.leaf == "weight" or role == "out" or not dense]  # inputs have no biases
        pruner = self._pruners.of(module)
        possible = not found or (isinstance(pruner, ParametrisedPruner) and pruner.follows[role])
        return None if possible else found[0].reason(name)


def _kind(module: Any, role: Role) -> Kind:
    if is_passthrough(module):
        return "passthrough"
    return "producer" if role == "out" else "consumer"


def multiplied(ledger: Ledger, classes: Index) -> list[Place]:
    """Every labelled axis of every product."""
    return [
        Place(f"product {i}, axis {k}", "in", "passthrough", _whole(axis, classes), product=i)
        for i, product in enumerate(ledger.products)
        for k, axis in enumerate(product.axes)
    ]


def _whole(labels: Index, classes: Index) -> Index:
    """The class of every index of an axis, shape (n,), of labels (n, m); -1 if it has none, or several."""
    found = np.where(labels > 0, classes[labels], -1)
    most: Index = found.max(1)
    return np.where(((found == most[:, None]) | (found < 0)).all(1), most, -1)


def queries(ledger: Ledger, classes: Index, options: TraceOptions, places: Sequence[Place]) -> list[Place]:
    """Filters of queries whose dimensions may go while the code divides by the root of how many there are.

    All of one attention bear its number, also those that stay. A layer that runs several times counts once.
    """
    found: list[Place] = []
    known: set[tuple[Any, ...]] = set()
    for number, scaled in enumerate(ledger.scaled_queries(options.choices)):
        if all(len(np.unique(classes[row])) == 1 for row in scaled.rows):  # whole heads: their size stays
            continue
        layers: dict[str, Place] = {}
        for site in ledger.sites:
            mine = np.isin(np.arange(site.first, site.first + site.size), scaled.known)
            layer = site.name.removesuffix(".weight").removesuffix(".bias")
            if site.axis == 0 and mine.any() and any(p.name == layer and p.kind == "producer" for p in places):
                own = np.where(mine, classes[site.first : site.first + site.size], -1)
                layers.setdefault(layer, Place(layer, "out", "passthrough", own, query=number))
        content = tuple((place.name, place.classes.tobytes()) for place in layers.values())
        if content not in known:
            known.add(content)
            found += layers.values()
    return found


def normalised(ledger: Ledger, classes: Index) -> tuple[list[Place], list[tuple[Index, Reason]]]:
    """Every mean, variance and norm over channels once; and labels of those that run over others at another call."""
    found: dict[StatisticCall, Place] = {}
    unlike: list[tuple[Index, Reason]] = []
    for s in ledger.statistics:
        own = np.where(s.labels > 0, classes[s.labels], -1)
        known = found.setdefault(s.call, Place(str(s.call), "in", "passthrough", own, s.axis, statistic=s))
        if known.axis != s.axis or len(known.classes) != len(own) or (known.classes != own).any():
            reason: Reason = ("mixed", f"{s.where} normalises over other channels each time that it is called")
            unlike.append((np.concatenate([t.labels for t in ledger.statistics if t.call == s.call]), reason))
    return list(found.values()), unlike


def counted(ledger: Ledger, classes: Index, options: TraceOptions) -> list[Place]:
    """One of the axes that every number counts: they agree, or nothing of them goes."""
    found: dict[str, Follower] = {f.name: f for f in ledger.following(options.choices) if not f.kept}
    return [Place(f.name, "out", "passthrough", classes[f.labels], attribute=True) for f in found.values()]
