"""Search spaces from the groups of a network and the methods there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from ..errors import SearchSpaceError
from ..graph.groups import PrunableGroups
from ..pruning.domains import Choice, Domain, Float, Int
from ..pruning.registry import find_method
from .space import Parameter, SearchSpace
from .trial import BUDGETS, checked_allocator, checked_mode

__all__ = ["search_space"]

BOUNDS = {"ratio": (0.0, 0.9), "weight": (0.05, 20.0)}
"""Default bounds of what is searched per group."""


def search_space(
    groups: PrunableGroups | None = None,
    *,
    methods: Sequence[str] = ("catro", "itpruner", "psap", "magnitude"),
    options: bool = True,
    per_group: Literal["ratio", "weight", "width"] | None = None,
    bounds: tuple[float, float] | None = None,
    allocators: Sequence[str] | None = None,
    refit: Sequence[str | None] | None = None,
    budget: Mapping[str, tuple[float, float]] | None = None,
) -> SearchSpace:
    """What :func:`~tp_importance.automl.prune_trial` understands, as a space to search.

    Args:
        groups: the groups of the network, for ``per_group``.
        methods: names of methods; with one the method is fixed.
        options: search the hyper-parameters of the methods, too.
        per_group: search per coupled group its pruning ``"ratio"``, its ``"weight"`` in the convex program (any
            optimiser then stays on the budget) or its ``"width"`` in channels; default: widths come from the method.
        bounds: of ratios (default 0–0.9) or weights (default 0.05–20, logarithmic).
        allocators: let the search choose where widths come from, e.g. ``("default", "greedy", "program", "uniform")``.
        refit: let it choose the refit of the layers behind removed channels, e.g. ``("batchnorm", "sequential")``.
        budget: ranges of fractions, ``{"macs": (0.2, 0.8)}``, to search over the budget itself.

    Raises:
        SearchSpaceError: for an unknown method, allocator, refit or budget field, or a method that takes none of these
            together with ``per_group``, ``allocators`` or ``refit``.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from tp_importance import prunable_groups
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> groups = prunable_groups(net, torch.randn(1, 3, 8, 8))
        >>> space = search_space(groups, methods=["catro"], per_group="ratio")
        >>> [p.name for p in space.parameters]
        ['method', 'catro.class_weight', 'ratio:0']
    """
    if isinstance(methods, str) or not methods:
        raise SearchSpaceError(f"methods={methods!r} must be a list of names, e.g. ['catro', 'magnitude']")
    found = [find_method(name) for name in methods]
    parameters = [Parameter("method", Choice(tuple(methods)))]
    for method in found:
        if not (per_group is allocators is refit is None) and method.make is None:
            raise SearchSpaceError(
                f"method {method.name!r} takes no widths per group, no allocator and no refit; leave it out, or search "
                "over budget="
            )
        for option, domain in (method.options if options else {}).items():
            parameters.append(Parameter(f"{method.name}.{option}", domain, method.name))
    if allocators is not None:
        for choice in allocators:
            checked_allocator(choice)
        parameters.append(Parameter("allocator", Choice(tuple(allocators))))
    if refit is not None:
        for mode in refit:
            checked_mode(mode)
        parameters.append(Parameter("refit", Choice(tuple(refit))))
    for name, (low, high) in (budget or {}).items():
        if name not in BUDGETS or not 0 < low <= high <= 1:
            raise SearchSpaceError(f"budget {name}=({low}, {high}) must be fractions 0 < low <= high <= 1 of {BUDGETS}")
        parameters.append(Parameter(f"budget:{name}", Float(float(low), float(high))))
    return SearchSpace((*parameters, *_per_group(groups, per_group, bounds)))


def _per_group(
    groups: PrunableGroups | None, family: str | None, bounds: tuple[float, float] | None
) -> list[Parameter]:
    if family is None:
        return []
    if groups is None or not len(groups):
        raise SearchSpaceError(f"per_group={family!r} needs groups=, from prunable_groups(model, example_inputs)")
    if family not in ("ratio", "weight", "width"):
        raise SearchSpaceError(f"per_group={family!r} is unknown; choose 'ratio', 'weight' or 'width'")
    if bounds is not None:
        low, high = bounds
        if family == "width" or not 0 <= low <= high or (family == "ratio" and high > 1):
            raise SearchSpaceError(f"bounds={bounds} do not fit per_group={family!r}")
    result = []
    for g in groups:
        domain: Domain
        if family == "width":
            if g.unit_size > 1:
                raise SearchSpaceError(
                    f"group {g.name} goes in steps of {g.unit_size} channels; search over its ratio or weight instead"
                )
            domain = Int(g.min_units, g.width)
        else:
            low, high = BOUNDS[family] if bounds is None else bounds
            domain = Float(float(low), float(high), log=family == "weight")
        result.append(Parameter(f"{family}:{g.name}", domain))
    return result
