"""What a step that removed layers did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ...budget import Cost
from ...core.optional import optional_import
from ...latency.times import LatencyTimes
from ...pruning.report import CostReport
from ...recovery.report import RecoveryReport
from ...refitting.report import RefitReport

__all__ = ["LayerReport", "LayerRow"]


@dataclass(frozen=True)
class LayerRow:
    """One residual convolution in a report.

    Attributes:
        name: layer name.
        s: layer scaling factor before the step.
        a: information control before the step.
        macs: multiply-accumulates per sample of the layer.
        params: its parameters, fused.
        loss: what is lost with it.
        removed: whether it is gone.
    """

    name: str
    s: float
    a: float
    macs: int
    params: int
    loss: float = 0.0
    removed: bool = False


@dataclass(frozen=True)
class LayerReport(CostReport):
    """Result of one step of :class:`~tp_importance.ResConvPruner`.

    Attributes:
        rows: one per residual convolution, in the order of the network.
        dense: cost of the network before it was converted.
        cost: cost after the step, counted.
        limits: absolute limits of the budget.
        bytes_per_param: mean size of a parameter.
        left_out: per convolution that was never converted, why.
        collapsed: modules that are gone as a whole, with the factor they stood for.
        kept_scales: factors that no layer could take, by the module that applies them.
        latency_ms: latencies in milliseconds; none is known if none is limited.
        refit: what a refit of the layers that stay did, if there was one.
        recovery: what a recovery did, if there was one.
    """

    rows: list[LayerRow]
    dense: Cost
    cost: Cost
    limits: dict[str, int]
    bytes_per_param: float
    left_out: dict[str, str] = field(default_factory=dict)
    collapsed: dict[str, float] = field(default_factory=dict)
    kept_scales: dict[str, float] = field(default_factory=dict)
    latency_ms: LatencyTimes = field(default_factory=LatencyTimes)
    refit: RefitReport | None = None
    recovery: RecoveryReport | None = None

    @property
    def removed(self) -> list[str]:
        """Names of the layers that are gone."""
        return [row.name for row in self.rows if row.removed]

    def __str__(self) -> str:
        width = max([5, *(len(r.name) for r in self.rows)])
        lines = [f"{'layer':<{width}}  {'s':>9}  {'a':>9}  {'loss':>9}  {'MACs':>6}  "]
        for r in self.rows:
            share = r.macs / max(self.dense.macs, 1)
            gone = "  removed" if r.removed else ""
            lines.append(f"{r.name:<{width}}  {r.s:>9.4f}  {r.a:>9.4f}  {r.loss:>9.3g}  {share:>6.3f}{gone}")
        lines += ["", f"{len(self.removed)} of {len(self.rows)} layers removed", *self.cost_lines()]
        lines += [f"gone as a whole: {name} (times {factor:.4g})" for name, factor in self.collapsed.items()]
        lines += [f"an explicit factor stays: {name} (times {factor:.4g})" for name, factor in self.kept_scales.items()]
        lines += [f"left alone: {name}: {reason}" for name, reason in self.left_out.items()]
        lines += [str(part) for part in (self.refit, self.recovery) if part is not None]
        return "\n".join(lines)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LayerReport:
        """Rebuild a report from :meth:`to_dict`."""
        costs = {key: Cost(**data[key]) for key in ("dense", "cost")}
        rows, times = [LayerRow(**row) for row in data["rows"]], LatencyTimes.from_dict(data["latency_ms"])
        refit = None if data.get("refit") is None else RefitReport.from_dict(data["refit"])
        recovery = None if data.get("recovery") is None else RecoveryReport(**data["recovery"])
        return cls(**{**data, **costs, "rows": rows, "latency_ms": times, "refit": refit, "recovery": recovery})

    def to_frame(self) -> Any:
        """The rows as ``pandas.DataFrame``.

        Raises:
            RuntimeError: without pandas; names the extra.
        """
        return optional_import("pandas").DataFrame([asdict(r) for r in self.rows])
