"""What PSAP did at every prune step, as plain data, data frame and picture."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ...core.optional import optional_import

__all__ = ["GroupStep", "PSAPHistory", "PruneStep"]


@dataclass(frozen=True)
class GroupStep:
    """One group at one prune step.

    Attributes:
        group: its name.
        sparsity: weight sparsity ratio before the step.
        ratio: fraction of the units that is masked after it.
        width: channels left.
        protected: units that could not be masked at this step.
        macs: MACs that hang on the group at these widths.
        restored: units that the pulse after the step brought back.
        exchanged: units masked in their place (last step only).
        yielded: units whose protection was given up, or that the pulse would have restored, for the budget's sake.
    """

    group: str
    sparsity: float
    ratio: float
    width: int
    protected: tuple[int, ...]
    macs: int
    restored: tuple[int, ...] = ()
    exchanged: tuple[int, ...] = ()
    yielded: tuple[int, ...] = ()


@dataclass(frozen=True)
class PruneStep:
    """One prune step.

    Attributes:
        step: 1 … number of prune steps.
        iteration: optimizer steps before it.
        limits: largest cost allowed at this step, by field of the budget.
        cost: cost right after masking, by field.
        kappa: κ of :func:`~tp_importance.methods.psap.sparsity.adaptive_widths`.
        rows: one per group.
    """

    step: int
    iteration: int
    limits: dict[str, int]
    cost: dict[str, int]
    kappa: float
    rows: tuple[GroupStep, ...]

    def with_pulse(self, changes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> PruneStep:
        """The same step with what its pulse changed, ``{group: {"restored": ..., ...}}``; yielded units add up."""
        rows = []
        for row in self.rows:
            change: dict[str, Any] = dict(changes.get(row.group, {}))
            yielded = row.yielded + change.pop("yielded", ())
            rows.append(replace(row, **change, yielded=yielded))
        return replace(self, rows=tuple(rows))


@dataclass
class PSAPHistory(Sequence[PruneStep]):
    """All prune steps so far, oldest first."""

    steps: list[PruneStep] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[PruneStep]:
        return iter(self.steps)

    def __getitem__(self, index: Any) -> Any:
        return self.steps[index]

    def to_list(self) -> list[dict[str, Any]]:
        """Plain data, ready for JSON and ``torch.load(weights_only=True)``."""
        return [asdict(step) for step in self.steps]

    @classmethod
    def from_list(cls, data: Sequence[Mapping[str, Any]]) -> PSAPHistory:
        """Rebuild a history from :meth:`to_list`."""
        return cls([PruneStep(**{**d, "rows": tuple(_row(r) for r in d["rows"])}) for d in data])

    def to_frame(self) -> Any:
        """One row per step and group as ``pandas.DataFrame``; units as counts, costs of the whole network beside.

        Raises:
            RuntimeError: without pandas; names the extra.
        """
        rows = []
        for step in self.steps:
            for r in step.rows:
                counts = {k: len(getattr(r, k)) for k in ("protected", "restored", "exchanged", "yielded")}
                totals = {f"total_{f}": v for f, v in step.cost.items()}
                limits = {f"limit_{f}": v for f, v in step.limits.items()}
                head = {"step": step.step, "iteration": step.iteration, "kappa": step.kappa}
                rows.append({**head, **asdict(r), **counts, **totals, **limits})
        return optional_import("pandas").DataFrame(rows)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Ratios of all groups and the cost of the network over the iterations.

        Args:
            path: written there if given (format by suffix).

        Returns:
            The ``matplotlib`` figure.

        Raises:
            RuntimeError: without matplotlib; names the extra.
            ValueError: before the first prune step.
        """
        if not self.steps:
            raise ValueError("there is nothing to plot before the first prune step")
        figure = optional_import("matplotlib.figure").Figure(figsize=(7, 6), layout="tight")
        above, below = figure.subplots(2, sharex=True)
        iterations = [s.iteration for s in self.steps]
        for g, row in enumerate(self.steps[0].rows):
            ratios = [s.rows[g].ratio for s in self.steps]
            above.step(iterations, ratios, where="post", label=row.group)
            back = [(i, r) for i, r, s in zip(iterations, ratios, self.steps, strict=True) if s.rows[g].restored]
            if back:
                above.plot(*zip(*back, strict=True), "k^", markersize=4)
        above.set_ylabel("masked fraction (▲: some restored)")
        if len(self.steps[0].rows) <= 12:
            above.legend(fontsize=7)
        for name in self.steps[0].limits:
            line = below.step(iterations, [s.cost[name] for s in self.steps], where="post", label=name)[0]
            limits = [s.limits[name] for s in self.steps]
            below.step(iterations, limits, where="post", color=line.get_color(), linestyle=":", label=f"{name} limit")
        below.set_xlabel("optimizer steps")
        below.legend(fontsize=7)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure


def _row(data: Mapping[str, Any]) -> GroupStep:
    units = {k: tuple(data[k]) for k in ("protected", "restored", "exchanged", "yielded")}
    return GroupStep(**{**data, **units})
