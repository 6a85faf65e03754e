"""Which layers to remove for a budget: the cheapest set by a knapsack, checked against the clock for latency."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from ...allocation.limits import count_hint
from ...budget import Budget, Cost
from ...core.arguments import checked_budget
from ...core.processes import warned_once
from ...core.progress import phase, shown, shows_progress
from ...errors import BudgetError
from ...graph.cost import exceeded
from ...latency.times import LatencyTimes
from .block import ResConv2d, resconv_layers
from .conversion import ConversionReport
from .costs import LayerClock, LayerCosts
from .fusion import cheapest_removal
from .losses import LayerImportance, output_losses, removal_controls, scale_losses

__all__ = ["LOSSES", "LayerPlan", "LayerPlanner"]

ATTEMPTS = 12
"""Measurements towards a latency budget; the last one removes all layers, so what is called unreachable was tried."""
LOSSES: dict[str, Callable[..., dict[str, float]]] = {"scale": scale_losses, "output": output_losses}


@dataclass(frozen=True)
class LayerPlan:
    """What :meth:`~tp_importance.ResConvPruner.step` would do.

    Attributes:
        removed: layers to remove, in the order of the network.
        losses: what is lost with each layer, also with those that stay.
        cost: exact cost of the network that is left, fused.
        dense: cost of the network before it was converted.
        limits: absolute limits of the budget.
        controls: per removed layer what it hands on, see :func:`.removal_controls`; empty without data.
        latency_ms: latencies in milliseconds, ``predicted`` as a sum of layers; none is known if none is limited.
        savings: per cost field, what the removal of each layer saves of the fused network.
    """

    removed: list[str]
    losses: dict[str, float]
    cost: Cost
    dense: Cost
    limits: dict[str, int]
    controls: dict[str, float]
    latency_ms: LatencyTimes = field(default_factory=LatencyTimes)
    savings: dict[str, dict[str, int]] = field(default_factory=dict)


class LayerPlanner:
    """A network with layers to remove, what each of them is worth and saves, and the budget.

    Args:
        model: a converted network.
        example_inputs: tensor, tuple or dict, batch dimension first.
        loader: batches for the losses of layers, if there are any.
        budget: what the network may cost.
        importance: name in :data:`LOSSES`, or a function ``(model, {name: layer}) → {name: loss}``.
        conversion: what was converted, and why the rest was not.
        forward_fn: ``forward_fn(model, example_inputs)``.
        min_run_time: seconds per latency measurement.
        progress: show a progress bar for every phase; by default in a terminal.

    Attributes:
        dense: cost of the network before conversion.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        loader: Iterable[Any] | None,
        *,
        budget: Budget,
        importance: str | LayerImportance,
        conversion: ConversionReport,
        forward_fn: Callable[[nn.Module, Any], Any] | None,
        min_run_time: float,
        progress: bool | None,
    ) -> None:
        self.model, self.loader, self.budget, self.conversion = model, loader, budget, conversion
        self._example_inputs, self._forward_fn, self._min_run_time = example_inputs, forward_fn, min_run_time
        self._importance, self._progress = importance, progress
        self._counted: tuple[Any, LayerCosts] | None = None
        self.dense: Cost = self._costs().dense
        self._dense_ms: float | None = None

    @property
    def layers(self) -> dict[str, ResConv2d]:
        """The residual convolutions that are left, by name."""
        return resconv_layers(self.model)

    @shows_progress
    def losses(self) -> dict[str, float]:
        """What is lost with each layer, in the order of the network.

        Raises:
            RuntimeError: after the model was fused.
            ValueError: if the importance gives a value that is missing, negative or not finite, or for bad data.
        """
        return self._losses({})

    def _losses(self, controls: dict[str, float]) -> dict[str, float]:
        layers = self._require_layers()
        if callable(self._importance):
            found = dict(self._importance(self.model, layers))
        else:
            measure = LOSSES[self._importance]
            options: dict[str, Any] = {"controls": controls} if controls else {}
            found = measure(self.model, layers, self.loader, self._example_inputs, self._forward_fn, **options)
        for name in layers:
            if not (np.isfinite(found.get(name, np.nan)) and found[name] >= 0):
                raise ValueError(
                    f"importance gives {found.get(name)} for layer {name}; it must be a finite number >= 0"
                )
        return {name: float(found[name]) for name in layers}

    @warned_once()
    def plan(self, budget: Budget | None = None) -> LayerPlan:
        """Which layers would go; the model is not touched. A latency budget is measured on copies.

        Args:
            budget: default: the pruner's.

        Raises:
            BudgetError: if the budget cannot be reached; names the least reachable cost.
            RuntimeError: after the model was fused.
        """
        chosen = checked_budget(self.budget if budget is None else budget)
        with shown(self._progress):
            # the losses by the output need them for all layers, the plan for those that go
            controls = self._controls(list(self._require_layers())) if self._importance == "output" else {}
            losses = self._losses(controls)
            return self._cheapest_plan(chosen, losses, controls)

    def require_reachable(self, budget: Budget | None = None) -> None:
        """Refuse a budget that cannot be reached whatever the losses; the model is not touched.

        Args:
            budget: default: the pruner's.

        Raises:
            BudgetError: as :meth:`plan`.
            RuntimeError: after the model was fused.
        """
        chosen = checked_budget(self.budget if budget is None else budget)
        with shown(self._progress):
            self._cheapest_plan(chosen, dict.fromkeys(self._require_layers(), 0.0), None)

    def _cheapest_plan(self, chosen: Budget, losses: dict[str, float], known: dict[str, float] | None) -> LayerPlan:
        """The plan for given losses; ``known``: what layers hand on, ``None``: nobody wants to know."""
        costs = self._costs()
        limits, least = chosen.marked_limits(self.dense), costs.without(list(losses)).as_dict()
        for f in exceeded(least, limits):
            raise BudgetError(
                f"the budget of {limits[f]} {f} cannot be reached by removing layers: with all {len(losses)} removed "
                f"{least[f]} {f} are left. Give at least {least[f]}, or prune channels after fusing"
                + self._left_out()
                + count_hint(f, limits[f], self.dense.as_dict()[f])
            )
        needed = {f: float(costs.fused.as_dict()[f] - limit) for f, limit in limits.items()}
        if chosen.is_measured:
            gone, times = self._timed_removal(chosen, losses, costs, needed)
        else:
            with phase("choosing layers", layers=len(losses)):
                gone, times = _cheapest(losses, costs.savings, needed), LatencyTimes()
        controls = {name: known[name] for name in gone} if known else {} if known is None else self._controls(gone)
        return LayerPlan(gone, losses, costs.without(gone), self.dense, limits, controls, times, costs.savings)

    def _costs(self) -> LayerCosts:
        """Costs of the network as it is, counted once for the same modules and shapes."""
        modules = tuple((name, type(module)) for name, module in self.model.named_modules())
        now = (modules, tuple(p.shape for p in self.model.parameters()))
        if self._counted is None or self._counted[0] != now:
            self._counted = now, LayerCosts.of(self.model, self._example_inputs, self._forward_fn)
        return self._counted[1]

    def _require_layers(self) -> dict[str, ResConv2d]:
        layers = self.layers
        if not layers:
            raise RuntimeError("the model has no ResConv2d any more (it was fused); make a new pruner to go on")
        return layers

    def _controls(self, removed: list[str]) -> dict[str, float]:
        """Factors of layers to remove; empty without data, where those with a = 0 become the identity."""
        if self.loader is None:
            return {}
        chosen = {name: layer for name, layer in self.layers.items() if name in removed}
        return removal_controls(self.model, chosen, self.loader, self._example_inputs, self._forward_fn)

    @phase("measuring latency")
    def _timed_removal(
        self, budget: Budget, losses: dict[str, float], costs: LayerCosts, needed: dict[str, float]
    ) -> tuple[list[str], LatencyTimes]:
        """Plan by the times of single layers, measure the result, and ask for more as long as it is too slow."""
        clock = LayerClock(self.model, self._example_inputs, self._forward_fn, self._min_run_time)
        if self._dense_ms is None:
            self._dense_ms = clock.dense_ms
        limit = budget.latency_limit(self._dense_ms)
        assert limit is not None
        now, each = clock.without_ms([]), clock.layers_ms()
        short, gone, measured = now - limit, list[str](), now
        for attempt in range(ATTEMPTS):
            whole = sum(each.values()) * (1 - 1e-9)  # whatever the order of summation
            asked = {**needed, "latency_ms": whole if attempt == ATTEMPTS - 1 else min(short, whole)}
            gone = _cheapest(losses, {**costs.savings, "latency_ms": each}, asked)
            predicted = now - sum(each[name] for name in gone)
            measured = clock.without_ms(gone) if gone else now
            if measured <= limit:
                return gone, LatencyTimes(dense=self._dense_ms, limit=limit, predicted=predicted, measured=measured)
            if len(gone) == len(losses):
                break
            short = now - predicted + max(measured - limit, 0.5 * min(each[n] for n in losses if n not in gone))
        raise BudgetError(
            f"the latency budget of {limit:.3f} ms cannot be reached by removing layers: {measured:.3f} ms were "
            f"measured with {len(gone)} of {len(losses)} removed (dense: {self._dense_ms:.3f} ms). Allow more, or "
            "prune channels after fusing" + self._left_out()
        )

    def _left_out(self) -> str:
        """The first layers that cannot go, with the reasons."""
        named = [f"{name} ({reason})" for name, reason in self.conversion.left_out.items()]
        more = f" and {len(named) - 3} more" if len(named) > 3 else ""
        return f". Left out: {', '.join(named[:3])}{more}" if named else ""


def _cheapest(
    losses: dict[str, float], savings: Mapping[str, Mapping[str, float]], needed: Mapping[str, float]
) -> list[str]:
    names = list(losses)
    rows = {f: [saving[n] for n in names] for f, saving in savings.items()}
    return [names[i] for i in cheapest_removal(list(losses.values()), rows, needed)]
