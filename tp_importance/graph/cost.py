"""Exact cost of a network as a quadratic form of its group widths."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from ..budget import Cost
from ..core.types import Floats, Ints
from .cost_terms import COST_FIELDS, LeftOut, cost_terms
from .groups import PrunableGroups

__all__ = ["COST_FIELDS", "LATENCY", "CostModel", "Timed", "exceeded", "headroom"]

LATENCY = "latency_ms"
"""The limit that is predicted rather than counted."""

PREDICTED_TOLERANCE = 1e-9
"""Part of a predicted limit that is left for the rounding of sums of floats; counts are exact."""


class Timed(Protocol):
    """What predicts a latency that never falls when a width grows: a latency model, say."""

    def predict(self, units: ArrayLike) -> float:
        """Milliseconds for units of shape (G,)."""

    def marginal(self, units: ArrayLike, step: ArrayLike) -> Floats:
        """As :meth:`CostModel.marginal`, in milliseconds, shape (G,)."""


@dataclass(frozen=True, eq=False)
class CostModel:
    r"""Exact MACs and parameters for any widths of the groups.

    .. math:: cost_f(u) = k_f + \sum_g a_{fg} u_g + \sum_{g \le h} D_{fgh} u_g u_h

    where :math:`u_g` is the number of *units* of group g that are kept (channels / ``unit_size``). All
    coefficients are non-negative integers, so the cost is supermodular: a step never becomes cheaper when other
    groups grow.

    Attributes:
        names: group names, length G.
        unit_sizes: channels per unit, shape (G,).
        full: units of the network the model was built from, shape (G,).
        constant: shape (F,) for the fields :data:`COST_FIELDS`.
        linear: shape (F, G).
        quadratic: upper triangular, shape (F, G, G).
        latency: predicts milliseconds, where a latency may be limited.
        left_out: groups that are not pruned.
    """

    names: tuple[str, ...]
    unit_sizes: Ints
    full: Ints
    constant: Ints
    linear: Ints
    quadratic: Ints
    latency: Timed | None = None
    left_out: tuple[LeftOut, ...] = ()

    @classmethod
    def from_groups(cls, groups: PrunableGroups) -> CostModel:
        """Derive the quadratic form from groups and trace.

        Args:
            groups: groups from :func:`~tp_importance.prunable_groups`; the traced batch is divided out.

        Raises:
            ValueError: if the cost of a layer is no quadratic form with integer coefficients.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> from tp_importance import prunable_groups
            >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
            >>> cost = CostModel.from_groups(prunable_groups(net, torch.randn(1, 3, 8, 8)))
            >>> cost.cost({"0": 8}).macs, cost.cost({"0": 5}).macs
            (12384, 7740)
        """
        found = cost_terms(groups)
        return cls(
            tuple(g.name for g in groups),
            np.array([g.unit_size for g in groups], np.int64),
            np.array([g.n_units for g in groups], np.int64),
            found.constant,
            found.linear,
            found.quadratic,
            left_out=found.left_out,
        )

    @property
    def dense(self) -> Cost:
        """Cost of the network the model was built from."""
        return self._cost(self.evaluate(self.full))

    def units(self, widths: Mapping[str, int]) -> Ints:
        """Units per group for ``widths`` in channels; groups not named keep their full width.

        Raises:
            ValueError: for an unknown group or a width that is no multiple of the unit size or out of range.
        """
        u = self.full.copy()
        for name, width in widths.items():
            if name not in self.names:
                raise ValueError(f"no group is called {name!r}; there are {list(self.names)}")
            g = self.names.index(name)
            size = int(self.unit_sizes[g])
            if width % size or not 0 <= width <= size * self.full[g]:
                raise ValueError(
                    f"width {width} of group {name} is not admissible: it must be a multiple of {size} "
                    f"in 0..{size * self.full[g]}"
                )
            u[g] = width // size
        return u

    def widths(self, units: ArrayLike) -> dict[str, int]:
        """Widths in channels for ``units`` of shape (G,)."""
        return dict(zip(self.names, (np.asarray(units, np.int64) * self.unit_sizes).tolist(), strict=True))

    def cost(self, widths: Mapping[str, int]) -> Cost:
        """Cost for ``widths`` in channels; groups not named keep their full width."""
        return self._cost(self.evaluate(self.units(widths)))

    def evaluate(self, units: ArrayLike) -> Ints:
        """Cost for ``units`` of shape (G,); returns shape (F,)."""
        u = np.asarray(units, np.int64)
        return self.constant + self.linear @ u + (self.quadratic @ u) @ u

    def marginal(self, units: ArrayLike, step: ArrayLike) -> Ints:
        r"""Change of cost when one group at a time moves by ``step`` units, the others fixed.

        .. math:: \Delta_{fg} = s_g (a_{fg} + \sum_{h \ne g} D_{fgh} u_h + D_{fgg}(2 u_g + s_g))

        Args:
            units: current units, shape (G,).
            step: signed step per group, shape (G,).

        Returns:
            shape (F, G).
        """
        u, s = np.asarray(units, np.int64), np.asarray(step, np.int64)
        diagonal = np.einsum("fgg->fg", self.quadratic)
        cross = self.quadratic @ u + np.einsum("fhg,h->fg", self.quadratic, u)  # counts D_gg u_g twice
        return s * (self.linear + cross + diagonal * s)

    def spent(self, units: ArrayLike, fields: Iterable[str]) -> dict[str, float]:
        """Counted and predicted costs by name, for ``units`` of shape (G,).

        Args:
            units: units per group.
            fields: of :data:`COST_FIELDS`, and ``"latency_ms"``.

        Raises:
            ValueError: for a latency without a latency model.
        """
        names, values = list(fields), self.evaluate(units)
        found: dict[str, float] = {f: int(values[COST_FIELDS.index(f)]) for f in names if f != LATENCY}
        return {**found, LATENCY: self.timed.predict(units)} if LATENCY in names else found

    def within(self, units: ArrayLike, limits: Mapping[str, float]) -> bool:
        """Whether ``units`` of shape (G,) keep every limit: the one meaning of that, counted or predicted.

        Args:
            units: units per group.
            limits: upper limit per cost field, and of ``"latency_ms"``.

        Raises:
            ValueError: for a limit of latency without a latency model.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> from tp_importance import prunable_groups
            >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
            >>> cost = CostModel.from_groups(prunable_groups(net, torch.randn(1, 3, 8, 8)))
            >>> cost.within([5], {"macs": 7740}), cost.within([5], {"macs": 7739})
            (True, False)
        """
        return not self.exceeded(units, limits)

    def exceeded(self, units: ArrayLike, limits: Mapping[str, float]) -> dict[str, float]:
        """The costs of ``units`` of shape (G,) that are above their limits, by field; see :meth:`within`."""
        return exceeded(self.spent(units, limits), limits)

    @property
    def timed(self) -> Timed:
        """The latency model.

        Raises:
            ValueError: if there is none.
        """
        if self.latency is None:
            raise ValueError(
                "a latency is limited, but the cost model predicts none: use dataclasses.replace(cost, "
                "latency=LatencyModel.measure(groups, example_inputs)), or a BudgetPruner, which does"
            )
        return self.latency

    def shares(self, field: str = "macs") -> dict[str, float]:
        """Fraction of the full cost that hangs on each group; products of two groups count for both."""
        f = COST_FIELDS.index(field)
        lost = -self.marginal(self.full, -self.full)[f]
        return dict(zip(self.names, (lost / max(int(self.evaluate(self.full)[f]), 1)).tolist(), strict=True))

    def _cost(self, values: Ints) -> Cost:
        return Cost(**dict(zip(COST_FIELDS, map(int, values), strict=True)))


def headroom(spent: Mapping[str, Any], limits: Mapping[str, float]) -> dict[str, Any]:
    """How much may be added to costs under limits, by field; below 0 where a limit is exceeded.

    A predicted limit is lowered by :data:`PREDICTED_TOLERANCE` of itself.

    Args:
        spent: costs by field, numbers or arrays of them.
        limits: upper limit per field.
    """
    return {f: (limit * (1 - PREDICTED_TOLERANCE) if f == LATENCY else limit) - spent[f] for f, limit in limits.items()}


def exceeded(spent: Mapping[str, float], limits: Mapping[str, float]) -> dict[str, float]:
    """The costs that are above their limits.

    Args:
        spent: costs by field.
        limits: upper limit per field.

    Returns:
        Costs by field; empty if every limit is kept.

    Example:
        >>> exceeded({"macs": 5, "params": 7}, {"macs": 5, "params": 6})
        {'params': 7}
    """
    return {field: spent[field] for field, room in headroom(spent, limits).items() if room < 0}
