"""What was pruned, as text, data frame, JSON and picture."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from ..budget import Cost
from ..core.optional import optional_import
from ..graph.cost import CostModel
from ..graph.groups import Excluded, PrunableGroups
from ..latency.times import LatencyTimes
from ..refitting.report import RefitReport
from .output_change import OutputChange
from .plan import Plan

__all__ = ["CostReport", "GroupRow", "PruningReport", "bytes_per_parameter"]


@dataclass(frozen=True)
class GroupRow:
    """One group in a report.

    Attributes:
        name: group name.
        initial: channels of the model as given to the pruner.
        before: channels before this step.
        after: channels after it.
        macs_share: fraction of the MACs before this step that hangs on the group.
    """

    name: str
    initial: int
    before: int
    after: int
    macs_share: float

    @property
    def pruning_ratio(self) -> float:
        """Fraction of the initial channels that is gone."""
        return 1.0 - self.after / self.initial


class CostReport:
    """What all reports share: costs before and after, and plain data."""

    dense: Cost
    cost: Cost
    limits: dict[str, int]
    bytes_per_param: float
    latency_ms: LatencyTimes

    def totals(self) -> list[tuple[str, int, int]]:
        """``(what, of the model as given, now)`` for MACs, params and bytes of the parameters."""
        dense, now = self.dense.as_dict(), self.cost.as_dict()
        result = [(name, dense[name], now[name]) for name in dense]
        size = self.bytes_per_param
        return [*result, ("bytes", round(self.dense.params * size), round(self.cost.params * size))]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)  # type: ignore[call-overload]

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """JSON text, also written to ``path`` if given."""
        text = json.dumps(self.to_dict(), indent=1)
        if path is not None:
            with open(path, "w", encoding="utf-8") as file:
                file.write(text + "\n")
        return text

    def cost_lines(self) -> list[str]:
        """The totals as text."""
        lines = []
        for name, dense, after in self.totals():
            limit = f", limit {self.limits[name]:,}" if name in self.limits else ""
            lines.append(f"{name:<7}{dense:>16,} → {after:>16,}  ({after / max(dense, 1):.4f}{limit})")
        if self.latency_ms.is_limited:
            lines.append(f"latency, ms: {self.latency_ms}")
        return lines


@dataclass(frozen=True)
class PruningReport(CostReport):
    """Result of one pruning step.

    Attributes:
        rows: one per prunable group, in execution order.
        dense: cost of the model as given to the pruner.
        before: cost before this step.
        cost: cost after it, exact.
        limits: absolute limits of the budget.
        bytes_per_param: mean size of a parameter.
        excluded: groups that were left alone, with the reason.
        constant: number of units that did not vary on the data, per group that has any.
        criterion: name of the importance.
        refit: what the refit of the consumers did, if there was one.
        latency_ms: latencies in milliseconds; none is known if none is limited.
        uncounted: layers whose MACs are not known and in none of the costs, with the reason.
        outputs: how far they moved from those before this step; ``None`` if nothing was removed.
    """

    rows: list[GroupRow]
    dense: Cost
    before: Cost
    cost: Cost
    limits: dict[str, int]
    bytes_per_param: float
    excluded: list[Excluded]
    constant: dict[str, int] = field(default_factory=dict)
    criterion: str = ""
    refit: RefitReport | None = None
    latency_ms: LatencyTimes = field(default_factory=LatencyTimes)
    uncounted: dict[str, str] = field(default_factory=dict)
    outputs: OutputChange | None = None

    def __str__(self) -> str:
        width = max([5, *(len(r.name) for r in self.rows)])
        lines = [f"{'group':<{width}}  {'channels':>12}  {'removed':>7}  {'MACs':>6}"]
        for r in self.rows:
            arrow = f"{r.before} → {r.after}"
            lines.append(f"{r.name:<{width}}  {arrow:>12}  {r.pruning_ratio:>7.3f}  {r.macs_share:>6.3f}")
        lines.append("")
        lines += self.cost_lines()
        for name, count in self.constant.items():
            lines.append(f"constant on the data: {count} in {name}")
        for layer, reason in self.uncounted.items():
            lines.append(f"not counted: {layer}: {reason}")
        for e in self.excluded:
            lines.append(f"left alone: {e.name} ({e.width}): {e.reason}")
        if self.refit is not None:
            lines.append(str(self.refit))
        if self.outputs is not None:
            lines.append(str(self.outputs))
        return "\n".join(lines)

    @classmethod
    def of(
        cls,
        plan: Plan,
        groups: PrunableGroups,
        initial: Mapping[str, int],
        cost_model: CostModel,
        dense: Cost,
        criterion: str = "",
    ) -> PruningReport:
        """What a plan does to a network.

        Args:
            plan: what is to go.
            groups: of the network before.
            initial: channels per group of the network as given.
            cost_model: of the network before.
            dense: cost of the network as given.
            criterion: who chose the units.
        """
        before, share = groups.widths, cost_model.shares()
        return cls(
            rows=[
                GroupRow(g.name, initial.get(g.name, g.width), before[g.name], plan.widths[g.name], share[g.name])
                for g in groups
            ],
            dense=dense,
            before=cost_model.dense,
            cost=plan.cost,
            limits=plan.limits,
            bytes_per_param=bytes_per_parameter(groups.trace.model),
            excluded=list(groups.excluded),
            constant={g: len(u) for g, u in plan.constant.items()},
            criterion=criterion,
            latency_ms=plan.latency_ms,
            uncounted=dict(plan.uncounted),
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PruningReport:
        """Rebuild a report from :meth:`to_dict`."""
        costs = {key: Cost(**data[key]) for key in ("dense", "before", "cost")}
        rows = [GroupRow(**row) for row in data["rows"]]
        excluded = [Excluded(**row) for row in data["excluded"]]
        refit = None if data.get("refit") is None else RefitReport.from_dict(data["refit"])
        times = LatencyTimes.from_dict(data["latency_ms"])
        moved = None if data.get("outputs") is None else OutputChange(**data["outputs"])
        made = {"rows": rows, "excluded": excluded, "refit": refit, "latency_ms": times, "outputs": moved}
        return cls(**{**data, **costs, **made})

    def to_frame(self) -> Any:
        """The rows as ``pandas.DataFrame``.

        Raises:
            RuntimeError: without pandas; names the extra.
        """
        pandas = optional_import("pandas")
        return pandas.DataFrame([{**asdict(r), "pruning_ratio": r.pruning_ratio} for r in self.rows])

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Widths before and after as a bar chart.

        Args:
            path: written there if given (format by suffix).

        Returns:
            The ``matplotlib`` figure.

        Raises:
            RuntimeError: without matplotlib; names the extra.
        """
        figure = optional_import("matplotlib.figure").Figure(
            figsize=(max(4.0, 0.3 * len(self.rows) + 2), 4), layout="tight"
        )
        axes = figure.add_subplot()
        x = range(len(self.rows))
        axes.bar(x, [r.initial for r in self.rows], color="0.85", label="dense")
        axes.bar(x, [r.after for r in self.rows], label="kept")
        axes.set_xticks(list(x), [r.name for r in self.rows], rotation=90, fontsize=7)
        axes.set_ylabel("channels")
        axes.set_title(f"{self.criterion}: {self.cost}", fontsize=9)
        axes.legend()
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure


def bytes_per_parameter(model: nn.Module) -> float:
    """Mean size of a parameter, in bytes."""
    count = sum(p.numel() for p in model.parameters())
    return sum(p.numel() * p.element_size() for p in model.parameters()) / max(count, 1)
