"""Plans for many budgets, as table and picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from ..core.optional import optional_import
from .plan import Plan

__all__ = ["plot_sweep", "sweep_frame"]


def sweep_frame(plans: Sequence[Plan]) -> Any:
    """One row per plan: cost, fractions, certificate, and the width of every group.

    Args:
        plans: plans of one network.

    Returns:
        ``pandas.DataFrame`` with columns ``("width", group)`` and, for all else, ``("plan", ...)``.

    Raises:
        RuntimeError: without pandas; names the extra.
        ValueError: if the plans are of different networks.
    """
    _checked(plans)
    rows = []
    for plan in plans:
        dense = plan.dense.as_dict()
        cost = {key: value for key, value in plan.cost.as_dict().items()}
        shares = {f"{key}_fraction": value / max(dense[key], 1) for key, value in cost.items()}
        head = {("plan", key): value for key, value in {**cost, **shares, **plan.certificate}.items()}
        rows.append({**head, **{("width", name): width for name, width in plan.widths.items()}})
    frame = optional_import("pandas").DataFrame(rows)
    frame.columns = optional_import("pandas").MultiIndex.from_tuples(frame.columns)
    return frame


def plot_sweep(plans: Sequence[Plan], path: str | os.PathLike[str] | None = None) -> Any:
    """Kept fraction of every group against the MACs of the plan.

    Args:
        plans: plans of one network.
        path: written there if given (format by suffix).

    Returns:
        The ``matplotlib`` figure.

    Raises:
        RuntimeError: without matplotlib; names the extra.
        ValueError: if the plans are of different networks.
    """
    _checked(plans)
    figure = optional_import("matplotlib.figure").Figure(figsize=(7, 4.5), layout="tight")
    colours = optional_import("matplotlib").colormaps["viridis"]
    axes = figure.add_subplot()
    ordered = sorted(plans, key=lambda plan: plan.cost.macs)
    names = list(ordered[0].widths)
    x = [plan.cost.macs / max(plan.dense.macs, 1) for plan in ordered]
    widest = {name: max(plan.widths[name] for plan in ordered) for name in names}
    for i, name in enumerate(names):
        y = [plan.widths[name] / widest[name] for plan in ordered]
        axes.plot(x, y, marker=".", color=colours(i / max(len(names) - 1, 1)), label=name)
    axes.set_xlabel("MACs, fraction of the dense network")
    axes.set_ylabel("width, fraction of the widest plan")
    if len(names) <= 20:
        axes.legend(fontsize=6, ncols=2)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _checked(plans: Sequence[Plan]) -> None:
    if not plans:
        raise ValueError("there are no plans")
    if any(plan.dense != plans[0].dense or plan.widths.keys() != plans[0].widths.keys() for plan in plans):
        raise ValueError("the plans are of different networks")
