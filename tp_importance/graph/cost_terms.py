"""Coefficients of the exact cost of a network, from its groups and its trace."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from torch import nn

from ..core.types import Ints
from .groups import Excluded, Member, PrunableGroups
from .layer_kinds import CONV, is_passthrough
from .layer_pruners import input_weights
from .reparametrised import owner_of, sliced_sides

__all__ = ["COST_FIELDS", "CostTerms", "LeftOut", "channels_per_unit", "cost_terms"]

COST_FIELDS = ("macs", "params")
"""What a cost counts, in the order of all arrays of coefficients."""

_Affine = tuple[Fraction, dict[int, Fraction]]
_ONE: _Affine = (Fraction(1), {})


@dataclass(frozen=True)
class LeftOut:
    """A group that is not pruned, and what the layers that make its channels cost.

    Attributes:
        group: the group, with the reason.
        shares: fraction of the whole cost, by field.
    """

    group: Excluded
    shares: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class CostTerms:
    """Coefficients of the cost, a quadratic form of the units of G groups, see :mod:`tp_importance.graph.cost`.

    Attributes:
        constant: shape (F,) for the fields :data:`COST_FIELDS`.
        linear: shape (F, G).
        quadratic: upper triangular, shape (F, G, G).
        left_out: groups that are not pruned.
    """

    constant: Ints
    linear: Ints
    quadratic: Ints
    left_out: tuple[LeftOut, ...]


def cost_terms(groups: PrunableGroups) -> CostTerms:
    """Derive the coefficients with exact fractions.

    Args:
        groups: groups with their trace; the traced batch is divided out.

    Raises:
        ValueError: if the cost of a layer is no quadratic form with integer coefficients.
    """
    return _Builder(groups).build()


def channels_per_unit(groups: PrunableGroups) -> dict[tuple[str, str], dict[int, int]]:
    """Channels that one unit of every group takes of each side of a layer: ``{(layer, role): {position: n}}``.

    Args:
        groups: the groups.
    """
    sides: dict[tuple[str, str], dict[int, int]] = defaultdict(dict)
    for g, group in enumerate(groups):
        for m in group.members:
            sides[m.name, m.role][g] = len(m.channels) // group.n_units
    return dict(sides)


class _Builder:
    def __init__(self, groups: PrunableGroups):
        self.groups, self.excluded = groups.groups, groups.excluded
        self.model = groups.trace.model
        self.trace = groups.trace
        size = len(self.groups)
        self.constant = [Fraction(0)] * len(COST_FIELDS)
        self.linear = np.zeros((len(COST_FIELDS), size), object)
        self.quadratic = np.zeros((len(COST_FIELDS), size, size), object)
        self.sides = channels_per_unit(groups)

    def build(self) -> CostTerms:
        modules = dict(self.model.named_modules())
        positions: dict[str, int] = defaultdict(int)
        counted_params: set[int] = set()
        for call in self.trace.calls:
            positions[call.name] += call.macs
        functional = dict(self.trace.functional)
        self._add_products(positions, functional)
        for name, macs in positions.items():
            self._add_layer(0, name, modules[name], Fraction(macs, self.trace.batch_size))
        parameters = dict(self.model.named_parameters())
        for key, macs in functional.items():
            name = key.rpartition(".")[0]
            self._add_parameter(0, key, name, modules[name], parameters[key], Fraction(macs, self.trace.batch_size))
        for name, module in modules.items():
            for key, parameter in module.named_parameters(recurse=False):
                if id(parameter) in counted_params:
                    continue
                counted_params.add(id(parameter))
                full_name = f"{name}.{key}".lstrip(".")
                plain = key == "weight" and isinstance(module, (*CONV, nn.Linear))
                owner = None if plain else owner_of(name)
                if owner and isinstance(modules[owner[0]], (*CONV, nn.Linear)):
                    self._add_source(*owner, modules[owner[0]], parameter)
                else:
                    self._add_parameter(1, full_name, name, module, parameter, Fraction(parameter.numel()))
        left_out = tuple(self._left_out(e, positions, modules) for e in self.excluded)
        return CostTerms(_integers(self.constant), _integers(self.linear), _integers(self.quadratic), left_out)

    def _add_products(self, layers: dict[str, int], functional: dict[str, int]) -> None:
        """Products of data: proportional to what is left of every axis of theirs that loses anything.

        Args:
            layers: multiply-accumulates per layer; those of products with their weights are taken off.
            functional: likewise, per parameter.
        """
        total = self.trace.products
        axes: dict[tuple[int, str], dict[int, Member]] = defaultdict(dict)
        for g, group in enumerate(self.groups):
            for number, member in group.products:
                axes[number, member.name][g] = member
        for number, product in enumerate(self.trace.labels.products):
            if product.weights is not None:
                if not self._take_off(product.weights, product.macs, layers, functional):
                    continue
            elif self.trace.products:
                total -= product.macs
            else:
                continue
            sides = [self._fractions(members) for (n, _), members in axes.items() if n == number]
            if len(sides) > 2:
                raise ValueError("the cost is no quadratic form: three axes of one product lose channels")
            first, second = [*sides, _ONE, _ONE][:2]
            self._add_product(0, Fraction(product.macs, self.trace.batch_size), first, second)
        self.constant[0] += Fraction(total, self.trace.batch_size)  # what labels have not seen

    def _take_off(self, weights: Iterable[str], macs: int, layers: dict[str, int], functional: dict[str, int]) -> bool:
        """Take the operations of a product off those that are counted for its weight; whether they were."""
        for key in weights:
            module = key.rpartition(".")[0]
            if (module or key) in self.trace.uncounted:  # this product, maybe
                continue
            for counts, name in ((functional, key), (layers, module), (layers, (owner_of(module) or ("",))[0])):
                if counts.get(name, 0) >= macs:
                    counts[name] -= macs
                    return True
        return False

    def _fractions(self, members: Mapping[int, Member]) -> _Affine:
        """What is left of an axis that groups have a part in."""
        width = next(iter(members.values())).width
        per_unit = {g: Fraction(len(m.channels), self.groups[g].n_units) for g, m in members.items()}
        fixed = width - sum(n * self.groups[g].n_units for g, n in per_unit.items())
        return Fraction(fixed, width), {g: Fraction(n, width) for g, n in per_unit.items()}

    def _left_out(self, group: Excluded, macs: Mapping[str, int], modules: Mapping[str, nn.Module]) -> LeftOut:
        total = (sum(macs.values()), sum(p.numel() for p in self.model.parameters()))
        own = [0.0, 0.0]
        for name in group.layers:
            layer = modules.get(name)
            outputs = int(getattr(layer, "out_channels", None) or getattr(layer, "out_features", None) or group.width)
            part = min(group.width / outputs, 1.0)  # of a layer that a split cuts
            weight = None if layer is None else layer._parameters.get("weight")  # a computed one may move when read
            own[0] += part * macs.get(name, 0)
            own[1] += part * (0 if weight is None else weight.numel())
        return LeftOut(group, {f: o / max(t, 1) for f, o, t in zip(COST_FIELDS, own, total, strict=True)})

    def _side(self, name: str, role: str, width: int) -> _Affine:
        """Width of one side of a layer, divided by its dense width, as an affine function of the units."""
        per_unit = self.sides.get((name, role), {})
        fixed = width - sum(n * self.groups[g].n_units for g, n in per_unit.items())
        if fixed < 0:
            raise ValueError(f"{name}: groups claim more {role} channels than its {width}; exclude it (ignored_layers)")
        return Fraction(fixed, width), {g: Fraction(n, width) for g, n in per_unit.items()}

    def _add_layer(self, field: int, name: str, module: nn.Module, total: Fraction) -> None:
        """A term proportional to in-width × out-width; ``total`` is its dense value."""
        if not total:
            return
        if isinstance(module, CONV):
            inputs, outputs = module.in_channels, module.out_channels
        elif isinstance(module, nn.Linear):
            inputs, outputs = module.in_features, module.out_features
        else:  # attention: its channels are never in a group
            self.constant[field] += total
            return
        k_out, a_out = self._side(name, "out", outputs)
        if is_passthrough(module):
            k_in, a_in = _ONE
        else:
            k_in, a_in = self._side(name, "in", inputs)
        self._add_product(field, total, (k_in, a_in), (k_out, a_out))

    def _add_product(self, field: int, total: Fraction, first: _Affine, second: _Affine) -> None:
        (k_in, a_in), (k_out, a_out) = first, second
        self.constant[field] += total * k_in * k_out
        for g, n in a_in.items():
            self.linear[field, g] += total * n * k_out
        for g, n in a_out.items():
            self.linear[field, g] += total * n * k_in
        for g, n in a_in.items():
            for h, m in a_out.items():
                self.quadratic[field, min(g, h), max(g, h)] += total * n * m

    def _add_parameter(
        self, field: int, key: str, name: str, module: nn.Module, parameter: nn.Parameter, total: Fraction
    ) -> None:
        """A term proportional to the size of a parameter; ``total`` is its dense value."""
        if key.rpartition(".")[2] == "weight" and isinstance(module, (*CONV, nn.Linear)):
            self._add_layer(field, name, module, total)
        elif (key, "out") in self.sides or (key, "in") in self.sides:  # cut along one axis or two
            self._add_product(field, total, self._axis(key, "in"), self._axis(key, "out"))
        elif key.rpartition(".")[2] in input_weights(module):
            self._add_side(field, name, "in", parameter, total)
        else:  # one entry (or row) per channel of the owner's output side
            self._add_side(field, self._cut_as_a_whole(name), "out", parameter, total)

    def _cut_as_a_whole(self, name: str) -> str:
        """The module that a pruning function of the user's cuts with all that is in it, if there is one."""
        parts = name.split(".")
        outer = (".".join(parts[:depth]) for depth in range(1, len(parts)))
        return next((module for module in outer if (module, "out") in self.sides), name)

    def _axis(self, key: str, role: str) -> _Affine:
        """One axis of a tensor that is cut by itself."""
        member = next((m for g in self.groups for m in g.members if m.name == key and m.role == role), None)
        return _ONE if member is None else self._side(key, role, member.width)

    def _add_source(self, name: str, leaf: str, layer: nn.Module, parameter: nn.Parameter) -> None:
        """A parameter that the weight or bias of a layer is computed from."""
        sides, total = sliced_sides(layer, leaf, parameter), Fraction(parameter.numel())
        if len(sides) == 2:
            self._add_layer(1, name, layer, total)
        elif sides:
            self._add_side(1, name, sides[0], parameter, total)
        else:
            self.constant[1] += parameter.numel()

    def _add_side(self, field: int, owner: str, role: str, parameter: nn.Parameter, total: Fraction) -> None:
        """A term proportional to one side of a layer; ``total`` is its dense value."""
        member = next((m for g in self.groups for m in g.members if m.name == owner and m.role == role), None)
        if member is None or parameter.numel() % member.width:
            self.constant[field] += total
            return
        k, a = self._side(owner, role, member.width)
        self.constant[field] += total * k
        for g, n in a.items():
            self.linear[field, g] += total * n


def _integers(values: object) -> Ints:
    array = np.asarray(values, object)
    flat = [Fraction(v) for v in array.ravel()]
    if any(v.denominator != 1 for v in flat):
        raise ValueError("the cost is no quadratic form with integer coefficients of these groups; verify them")
    if math.prod(array.shape) and max(abs(v.numerator) for v in flat) >= 2**62:
        raise ValueError("the cost exceeds 64-bit integers")
    return np.array([v.numerator for v in flat], np.int64).reshape(array.shape)
