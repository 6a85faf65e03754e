"""Budget → widths: allocators on value curves and the exact cost model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..budget import Absolute
from ..core.types import Floats, Ints
from ..errors import BudgetError
from ..graph.cost import COST_FIELDS, LATENCY, CostModel
from ..graph.groups import ChannelGroup
from .curves import Curve, convex_envelope

__all__ = [
    "ALLOCATORS",
    "Allocator",
    "WidthSpace",
    "allocate",
    "fill_up",
    "find_allocator",
    "greedy",
    "greedy_path",
    "proportional",
    "require_reachable",
    "round_down",
    "uniform",
    "within",
]

Limits = Mapping[str, float]
Curves = Mapping[str, Curve]
Prices = dict[str, NDArray[Any]]


_REMEDIES = {
    "max_pruning_ratio": "raise max_pruning_ratio",
    "round_to": "lower round_to",
    "min_widths": "lower min_widths",
    "ignored": "ignore fewer layers",
}
"""What to do about each thing that keeps a network from becoming smaller."""

_NAMED, _TINY = 3, 100


@dataclass(frozen=True)
class WidthSpace:
    """Admissible widths of every group.

    Attributes:
        levels: per group the admissible numbers of units, ascending.
        binding: options that keep a group from becoming as narrow as the graph allows.
    """

    levels: tuple[Ints, ...]
    binding: tuple[str, ...] = dataclasses.field(default=(), compare=False)

    @classmethod
    def of(
        cls,
        groups: Sequence[ChannelGroup],
        *,
        round_to: int | None = None,
        max_pruning_ratio: float | Mapping[str, float] = 1.0,
        initial_widths: Mapping[str, int] | None = None,
        min_widths: Mapping[str, int] | None = None,
        max_widths: Mapping[str, int] | None = None,
    ) -> WidthSpace:
        """Widths that the graph, ``round_to``, ``max_pruning_ratio``, floors and ceilings allow.

        Args:
            groups: the groups.
            round_to: widths are multiples of it (in channels), or the present width.
            max_pruning_ratio: fraction of the initial channels of any group that may go, or one per group name
                (groups not named: 1).
            initial_widths: widths before the first step, for ``max_pruning_ratio``; default: present.
            min_widths: fewest channels per group name.
            max_widths: most channels per group name; without one, the present width is always admissible.

        Raises:
            ValueError: for a ``round_to`` below 1, a ratio outside [0, 1], or a group that is left no width.
        """
        if round_to is not None and (isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1):
            raise ValueError(f"round_to={round_to!r} must be a positive integer, e.g. 8")
        levels, binding = [], set[str]()
        for g in groups:
            ratio = max_pruning_ratio.get(g.name, 1.0) if isinstance(max_pruning_ratio, Mapping) else max_pruning_ratio
            if isinstance(ratio, bool) or not 0.0 <= ratio <= 1.0:
                raise ValueError(f"max_pruning_ratio={ratio!r} must be a fraction in [0, 1]")
            units = np.arange(g.min_units, g.n_units + 1, dtype=np.int64)
            initial = (initial_widths or {}).get(g.name, g.width)
            enough = units * g.unit_size >= np.ceil(initial * (1.0 - ratio) - 1e-9)
            rounded = (units * g.unit_size) % (round_to or 1) == 0
            least, most = (min_widths or {}).get(g.name, 0), (max_widths or {}).get(g.name, g.width)
            inside = (units * g.unit_size >= least) & (units * g.unit_size <= most)
            levels.append(units[((enough & rounded) | (units == g.n_units)) & inside])
            full = units == g.n_units
            options = {"max_pruning_ratio": enough, "round_to": rounded, "min_widths": units * g.unit_size >= least}
            binding |= {name for name, allowed in options.items() if not (allowed | full)[0]}
            if not len(levels[-1]):
                raise ValueError(
                    f"group {g.name} of {g.width} channels has no admissible width: min_widths {least}, max_widths "
                    f"{most}, max_pruning_ratio {ratio}, round_to {round_to}, units of {g.unit_size}, at least "
                    f"{g.min_units * g.unit_size}"
                )
        return cls(tuple(levels), tuple(name for name in _REMEDIES if name in binding))

    @property
    def floor(self) -> Ints:
        """Least admissible units, shape (G,)."""
        return np.array([lv[0] for lv in self.levels], np.int64)

    @property
    def full(self) -> Ints:
        """Largest admissible units, shape (G,): the present ones, or the ceiling."""
        return np.array([lv[-1] for lv in self.levels], np.int64)


class Walk:
    """Widths on their way up from the floor, with gains and prices of the next step of every group."""

    def __init__(self, curves: Curves, cost: CostModel, space: WidthSpace, fields: Sequence[str]):
        self.cost, self.space = cost, space
        self.level = np.zeros(len(space.levels), np.int64)
        self.units = space.floor
        self.counted = {f: COST_FIELDS.index(f) for f in fields if f != LATENCY}
        self.timed = cost.timed if LATENCY in fields else None
        self.scale = {f: max(v, 1e-9) for f, v in cost.spent(cost.full, fields).items()}
        envelopes = [convex_envelope(curves[n].loss) for n in cost.names]
        self.gains = [e[lv[:-1]] - e[lv[1:]] for e, lv in zip(envelopes, space.levels, strict=True)]
        self.steps = [np.diff(lv) for lv in space.levels]
        self.gain = np.array([g[0] if len(g) else -np.inf for g in self.gains])
        self.step = np.array([s[0] if len(s) else 0 for s in self.steps], np.int64)
        self.present = cost.spent(self.units, self.scale)
        # D + Dᵀ once: one row of it updates all marginal costs after a step
        self.coupling = cost.quadratic + cost.quadratic.transpose(0, 2, 1)
        self.diagonal = np.einsum("fgg->fg", cost.quadratic)
        self.slope = cost.linear + np.einsum("fgh,h->fg", self.coupling, self.units)

    @property
    def marginal(self) -> Prices:
        """Cost of the next step of every group by field, each of shape (G,)."""
        counts = self.step * (self.slope + self.diagonal * self.step)
        prices: Prices = {f: counts[row] for f, row in self.counted.items()}
        if self.timed is not None:
            prices[LATENCY] = self.timed.marginal(self.units, self.step)
        return prices

    def best(self, marginal: Prices, allowed: NDArray[np.bool_]) -> int:
        """Group with the largest gain per relative cost among ``allowed``."""
        price = sum(marginal[f] / self.scale[f] for f in marginal)
        ratio = np.where(allowed, self.gain / np.maximum(price, 1e-300), -np.inf)
        ratio[allowed & (price < 1e-12)] = np.inf  # costs nothing
        return int(ratio.argmax())

    def open(self) -> NDArray[np.bool_]:
        """Groups below their full width."""
        return self.step > 0

    def advance(self, g: int, marginal: Prices) -> None:
        """Take the next step of group ``g``."""
        step = self.step[g]
        self.present = {f: v + marginal[f][g] for f, v in self.present.items()}
        self.units[g] += step
        self.slope = self.slope + self.coupling[:, g] * step
        self.level[g] += 1
        more = self.level[g] < len(self.steps[g])
        self.gain[g] = self.gains[g][self.level[g]] if more else -np.inf
        self.step[g] = self.steps[g][self.level[g]] if more else 0

    def jump(self, units: Ints) -> None:
        """Go to admissible ``units`` at once."""
        self.level = np.array([np.searchsorted(lv, u) for lv, u in zip(self.space.levels, units, strict=True)])
        self.units = units.copy()
        self.present = self.cost.spent(units, self.scale)
        self.slope = self.cost.linear + np.einsum("fgh,h->fg", self.coupling, units)
        for g, level in enumerate(self.level):
            more = level < len(self.steps[g])
            self.gain[g] = self.gains[g][level] if more else -np.inf
            self.step[g] = self.steps[g][level] if more else 0

    def fits(self, marginal: Prices, limits: Limits) -> NDArray[np.bool_]:
        """Groups whose next step keeps every limit."""
        kept = [marginal[f] <= _lowered(f, limit) - self.present[f] for f, limit in limits.items()]
        return self.open() & np.all(kept, axis=0)

    def fill(self, limits: Limits, frozen: int | None = None) -> Ints:
        """Take steps that fit, best first, until none fits (one that does not fit never will: costs only grow).

        Group ``frozen`` takes none.
        """
        while True:
            allowed = self.fits(marginal := self.marginal, limits)
            if frozen is not None:
                allowed[frozen] = False
            if not allowed.any():
                return self.units.copy()
            self.advance(self.best(marginal, allowed), marginal)


def _lowered(field: str, limit: float) -> float:
    """A predicted limit without the rounding of sums of floats; counts are exact."""
    return limit * (1 - 1e-9) if field == LATENCY else limit


def _stair_tops(cost: CostModel, space: WidthSpace) -> WidthSpace:
    """The widths, of every group by itself, beyond which one more unit costs latency.

    Latency is a staircase: the first channel of a block pays for all of it. So greedy takes a block as one step.
    """
    longest = max((len(lv) for lv in space.levels), default=0)
    full = space.full
    at = [[lv[min(k, len(lv) - 1)] for lv in space.levels] for k in range(longest)]
    ms = np.array([cost.timed.marginal(full, np.array(units, np.int64) - full) for units in at])
    least = 1e-9 * cost.timed.predict(full)
    levels = []
    for g, lv in enumerate(space.levels):
        rises = np.diff(ms[: len(lv), g]) > least
        levels.append(lv[np.concatenate([[True], rises[1:], [True]]) if len(lv) > 1 else [True]])
    return WidthSpace(tuple(levels))


def greedy_path(
    curves: Curves, cost: CostModel, space: WidthSpace, fields: Sequence[str] = ("macs",)
) -> Iterator[tuple[int, int]]:
    r"""One sequence of steps from the floor to the full network, the same for every budget.

    Each step takes the group with the largest

    .. math:: \frac{L_g(c_g) - L_g(c_g^+)}{\sum_f \Delta cost_f / cost_f(\text{full})}

    where L is the convex envelope of the group's loss, :math:`c^+` its next admissible width and Δ the true
    marginal cost at the present widths.

    Args:
        curves: curve per group name.
        cost: the cost model.
        space: admissible widths.
        fields: which costs make the price.

    Yields:
        ``(group index, units after the step)``.
    """
    walk = Walk(curves, cost, space, fields)
    while walk.open().any():
        marginal = walk.marginal
        g = walk.best(marginal, walk.open())
        walk.advance(g, marginal)
        yield g, int(walk.units[g])


def greedy(curves: Curves, cost: CostModel, space: WidthSpace, limits: Limits) -> Ints:
    """Follow :func:`greedy_path` to the first step that does not fit, then fill what is left of the budget.

    Under a limit of ``latency_ms`` a step is priced by the latency it is predicted to cost, and goes up a whole stair.

    Two stages, as in CATRO's greedy allocation; no constant-factor guarantee holds for products of widths. Source:
    ours (the paper's own two-stage procedure is known by its abstract only).

    Args:
        curves: curve per group name.
        cost: the cost model.
        space: admissible widths.
        limits: upper limit per cost field.

    Returns:
        units per group, shape (G,): within every limit, and no further step fits.

    Raises:
        BudgetError: if the floor exceeds a limit; names the least reachable cost.
    """
    require_reachable(cost, space, limits)
    walk = Walk(curves, cost, _stair_tops(cost, space) if LATENCY in limits else space, tuple(limits))
    while walk.open().any():
        marginal = walk.marginal
        g = walk.best(marginal, walk.open())
        if not walk.fits(marginal, limits)[g]:
            break
        walk.advance(g, marginal)
    return fill_up(curves, cost, space, limits, walk.fill(limits))


def uniform(curves: Curves, cost: CostModel, space: WidthSpace, limits: Limits) -> Ints:
    """The largest common kept fraction that fits, widths rounded down, then filled by gain per cost.

    Args and returns as :func:`greedy`.
    """
    return proportional(curves, cost, space, limits, space.full)


def proportional(curves: Curves, cost: CostModel, space: WidthSpace, limits: Limits, shape: ArrayLike) -> Ints:
    """Widths in given proportions: the largest multiple of ``shape`` that fits, then filled by gain per cost.

    Args:
        curves: curve per group name.
        cost: the cost model.
        space: admissible widths; floors and ceilings hold whatever the shape.
        limits: upper limit per cost field.
        shape: units, only their proportions count, shape (G,); all 0 is as all equal.

    Returns:
        units per group, shape (G,): within every limit, and no further step fits.

    Raises:
        BudgetError: if the floor exceeds a limit; names the least reachable cost.
        ValueError: if ``shape`` has another length, or a value is negative or not finite.
    """
    require_reachable(cost, space, limits)
    goal, full = np.asarray(shape, np.float64), space.full.astype(np.float64)
    if goal.shape != full.shape or not np.isfinite(goal).all() or (goal < 0).any():
        raise ValueError(f"shape {goal.tolist()} must be {len(full)} finite numbers >= 0")
    goal = goal if goal.any() else full
    most = float((full[goal > 0] / goal[goal > 0]).max())

    def scaled(factor: float) -> Floats:
        return np.minimum(factor * goal, full)

    low, high = 0.0, most
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if within(cost, round_down(space, scaled(middle)), limits) else (low, middle)
    factor = most if within(cost, round_down(space, scaled(most)), limits) else low
    return fill_up(curves, cost, space, limits, scaled(factor))


def fill_up(curves: Curves, cost: CostModel, space: WidthSpace, limits: Limits, target: ArrayLike) -> Ints:
    """Round any units down to admissible ones that keep the limits, and fill what is left by gain per cost.

    Args:
        curves: curve per group name.
        cost: the cost model.
        space: admissible widths.
        limits: upper limit per cost field.
        target: units, need not be integer or admissible, shape (G,).

    Returns:
        units per group, shape (G,): within every limit, and no further step fits.

    Raises:
        BudgetError: if the floor exceeds a limit; names the least reachable cost.
    """
    require_reachable(cost, space, limits)
    goal, shrink = np.asarray(target, np.float64), 1e-9
    while not within(cost, units := round_down(space, goal), limits):  # it costs a rounding error too much
        goal, shrink = goal * (1 - shrink), 2 * shrink
    walk = Walk(curves, cost, space, tuple(limits))
    walk.jump(units)
    return walk.fill(limits)


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
            ``"max_pruning_ratio"``, ``"round_to"``, ``"min_widths"`` or ``"ignored"``, and the ``"reason"`` of groups
            that are ignored.

    Raises:
        BudgetError: naming the least reachable cost.
    """
    floor = cost.spent(space.floor, limits)
    for field, limit in limits.items():
        if floor[field] > _lowered(field, limit):
            style, are = (".4g", "predicted") if field == LATENCY else ("", "left")
            raise BudgetError(
                f"the budget of {limit:{style}} {field} cannot be reached: with every group at its floor "
                f"{floor[field]:{style}} {field} are {are}. "
                + _joined([f"Give at least {floor[field]:{style}}", *_remedies(cost, space, host)])
                + _left_out(cost, field, host)
                + count_hint(field, limit, cost.spent(cost.full, [field])[field])
            )


def count_hint(field: str, limit: float, dense: float) -> str:
    """What an absolute limit so small was meant as, perhaps.

    Args:
        field: of the cost.
        limit: upper limit of it, as :meth:`~tp_importance.Budget.marked_limits` gives it.
        dense: present cost.

    Example:
        >>> from tp_importance import Budget, Cost
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
    ignored = ["ignored"] if any(e.group.ignored for e in cost.left_out) else []
    return [host.get(name, _REMEDIES[name]) for name in (*space.binding, *ignored)]


def _joined(parts: Sequence[str]) -> str:
    return ", or ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


def _left_out(cost: CostModel, field: str, host: Mapping[str, str]) -> str:
    """The largest groups that are not pruned, with the reasons."""
    by = "macs" if field == LATENCY else field
    largest = sorted(cost.left_out, key=lambda e: -e.shares[by])
    named = [
        f"{e.group.name} ({e.group.width} channels, {100 * e.shares[by]:.1f} % of the {by}: "
        f"{host.get('reason', e.group.reason) if e.group.ignored else e.group.reason})"
        for e in largest[:_NAMED]
    ]
    more = f" and {len(largest) - _NAMED} more" if len(largest) > _NAMED else ""
    return f". Left out: {', '.join(named)}{more}" if named else ""


def round_down(space: WidthSpace, units: Floats) -> Ints:
    """Admissible units at or below ``units``, or the floor; shape (G,)."""
    pairs = zip(space.levels, units, strict=True)
    return np.array([lv[max(int(np.searchsorted(lv, u + 1e-9, "right")) - 1, 0)] for lv, u in pairs], np.int64)


def within(cost: CostModel, units: Ints, limits: Limits) -> bool:
    """Whether ``units`` of shape (G,) keep all limits."""
    values = cost.spent(units, limits)
    return all(values[f] <= _lowered(f, limit) for f, limit in limits.items())


Allocator = Callable[[Curves, CostModel, WidthSpace, Limits], Ints]
"""Any function with the arguments of :func:`greedy`."""

ALLOCATORS: dict[str, Allocator] = {"greedy": greedy, "uniform": uniform}

_PRICES_LATENCY = (greedy, uniform)
"""Allocators that take a limit of ``latency_ms`` as it is."""

_BISECTIONS = 16


def allocate(allocator: Allocator, curves: Curves, cost: CostModel, space: WidthSpace, limits: Limits) -> Ints:
    """Widths by any allocator under any limits.

    Greedy and uniform know predicted latency. All other allocators know counts only; they are given the largest
    limit of MACs (by bisection) at which what they return also keeps the latency, and the rest of the budget is filled
    by gain per cost.

    Args:
        allocator: the allocator.
        curves: curve per group name.
        cost: the cost model.
        space: admissible widths.
        limits: upper limit per cost field, and of ``latency_ms``.

    Returns:
        units per group, shape (G,): with a latency limit within every limit, and no further step fits; else what the
        allocator returns.

    Raises:
        BudgetError: if the floor exceeds a limit; names the least reachable cost.
    """
    if LATENCY not in limits or allocator in _PRICES_LATENCY:
        return allocator(curves, cost, space, limits)
    require_reachable(cost, space, limits)
    counts = {f: v for f, v in limits.items() if f != LATENCY}
    low, high = (int(cost.spent(u, ["macs"])["macs"]) for u in (space.floor, space.full))
    high = min(high, int(counts.get("macs", high)))

    def under(macs: int) -> Ints:
        return allocator(curves, cost, space, {**counts, "macs": macs})

    if not within(cost, units := under(high), limits):
        units = space.floor
        for _ in range(_BISECTIONS):
            if high - low < 2:
                break
            middle = (low + high) // 2
            if within(cost, found := under(middle), limits):
                low, units = middle, found
            else:
                high = middle
        under(low)  # what the allocator says of its last widths is of these
    return fill_up(curves, cost, space, limits, units)


def find_allocator(choice: str | Allocator) -> Allocator:
    """Look an allocator up by name; callables pass through.

    Raises:
        TypeError: for what is neither a name nor a function.
        ValueError: for an unknown name.
    """
    if isinstance(choice, type):
        raise TypeError(f"allocator={choice.__name__} is a class; make one of it: allocator={choice.__name__}()")
    if callable(choice):
        return choice
    if not isinstance(choice, str):
        raise TypeError(f"allocator={choice!r} must be one of {sorted(ALLOCATORS)}, or a function")
    if choice not in ALLOCATORS:
        raise ValueError(f"unknown allocator {choice!r}; known: {sorted(ALLOCATORS)}, or pass a function")
    return ALLOCATORS[choice]
