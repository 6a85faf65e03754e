"""Limits that no admissible widths keep, and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from ..budget import Absolute
from ..errors import BudgetError
from ..graph.cost import LATENCY, CostModel
from .space import WidthSpace

__all__ = ["Limits", "count_hint", "require_reachable"]

Limits = Mapping[str, float]
"""Upper limit per cost field, and of ``"latency_ms"``; what keeps them is :meth:`.CostModel.within`."""

_REMEDIES = {
    "max_pruning_ratio": "raise max_pruning_ratio",
    "round_to": "lower round_to",
    "min_widths": "lower min_widths",
    "keep_padded": "set keep_padded=False",
    "ignored": "ignore fewer layers",
}
"""What to do about each thing that keeps a network from becoming smaller."""

_NAMED, _TINY = 3, 100


def require_reachable(
    cost: CostModel,
    space: WidthSpace,
    limits: Limits,
    host: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Refuse limits that the floor exceeds.

    The message names only what keeps this network from becoming smaller: options that bind, and the largest groups that
    are left out.

    Args:
        cost: the cost model.
        space: admissible widths.
        limits: upper limit per cost field.
        host: what is to be said to users of another host, who do not know our options: a remedy in place of that for
            ``"max_pruning_ratio"``, ``"round_to"``, ``"min_widths"``, ``"keep_padded"`` or ``"ignored"``, and the
            ``"reason"`` of groups that are ignored.

    Raises:
        BudgetError: naming the least reachable cost.
    """
    for field, least in cost.exceeded(space.floor, limits).items():
        style, are = (".4g", "predicted") if field == LATENCY else ("", "left")
        raise BudgetError(
            f"the budget of {limits[field]:{style}} {field} cannot be reached: with every group at its floor "
            f"{least:{style}} {field} are {are}. "
            + _joined([f"Give at least {least:{style}}", *_remedies(cost, space, host)])
            + _left_out(cost, field, host)
            + count_hint(field, limits[field], cost.spent(cost.full, [field])[field])
        )


def count_hint(field: str, limit: float, dense: float) -> str:
    """What an absolute limit so small was meant as, perhaps.

    Args:
        field: of the cost.
        limit: upper limit of it, as :meth:`~tp_importance.Budget.marked_limits` gives it.
        dense: present cost.

    Example:
        >>> from tp_importance import Budget
        >>> from tp_importance.budget import Cost
        >>> limits = Budget(macs=50).marked_limits(Cost(macs=10**6, params=10**3))
        >>> count_hint("macs", limits["macs"], 10**6)
        '. A limit of 50 is 50 macs in all; for 50 % of them give Budget(macs=0.5)'
        >>> count_hint("macs", limits["macs"], 60)
        ''
    """
    if not isinstance(limit, Absolute) or limit > _TINY or dense <= _TINY:
        return ""
    whole = int(limit)
    return f". A limit of {whole} is {whole} {field} in all; for {whole} % of them give Budget({field}={whole / 100})"


def _remedies(cost: CostModel, space: WidthSpace, host: Mapping[str, str]) -> list[str]:
    ignored = ["ignored"] if any(e.group.kind == "ignored" for e in cost.left_out) else []
    return [host.get(name, _REMEDIES[name]) for name in (*space.binding, *ignored)]


def _joined(parts: Sequence[str]) -> str:
    return ", or ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


def _left_out(cost: CostModel, field: str, host: Mapping[str, str]) -> str:
    """The largest groups that are not pruned, with the reasons."""
    by = "macs" if field == LATENCY else field
    largest = sorted(cost.left_out, key=lambda e: -e.shares[by])
    named = [
        f"{e.group.name} ({e.group.width} channels, {100 * e.shares[by]:.1f} % of the {by}: "
        f"{host.get('reason', e.group.reason) if e.group.kind == 'ignored' else e.group.reason})"
        for e in largest[:_NAMED]
    ]
    more = f" and {len(largest) - _NAMED} more" if len(largest) > _NAMED else ""
    return f". Left out: {', '.join(named)}{more}" if named else ""
