"""Does pruning work on every network? Time to find its groups, what can go, one real pruning, and Torch-Pruning alone.

Random weights: nothing here depends on what a network has learned. Every network runs in a process of its own, every
part of it within a time limit. Cells that are there are not made again: delete their line to do so.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.experiment import Experiment, Run
from benchmarks.tables import Rows, listing
from benchmarks.zoo.catalogue import CATALOGUE, chosen
from benchmarks.zoo.parts import parts_of
from benchmarks.zoo.runner import examine

PASSES, SECONDS = 10, 2
"""Groups of the networks marked ``quick`` must be found and verified within so many forward passes, and so long."""


def keys(run: Run) -> Iterator[dict[str, Any]]:
    yield from ({"network": network.name} for network in chosen(run.only))


def cell(run: Run, key: dict[str, Any]) -> dict[str, Any]:
    parts = parts_of(CATALOGUE[key["network"]])
    return examine(key["network"], parts, limit=run.limit, threads=run.threads, repeats=run.repeats)


def failure(values: dict[str, Any]) -> str | None:
    """Why a part has no values."""
    if "timeout" in values:
        return f"more than {values['timeout']} s"
    return next((values[k] for k in ("error", "died", "skipped") if k in values), None)


def _of(part: str, text: Any) -> Any:
    """A column that shows ``text(values)`` of a part, or why there are none; its row may lack the part."""

    def column(row: dict[str, Any]) -> str:
        values = row.get(part, {})
        if not values or "skipped" in values:
            return ""
        return _short(failure(values)) if failure(values) else str(text(values))

    return column


def _short(text: str | None) -> str:
    return (text or "").replace("|", "/")[:60]


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


def _half(values: dict[str, Any]) -> str:
    if values["met"]:
        return f"yes, {_percent(values['reached'])}"
    return f"no: {_percent(values['reached'])} of {_percent(values['budget'])}"


def _agrees(row: dict[str, Any]) -> str:
    """Masked = removed, three times: two comparisons of the package, and the judge that knows no groups."""
    checks, pruned = row.get("oracle", {}), row.get("half", {})
    if failure(checks) or "masked_is_removed" not in checks:
        return ""
    problems = [checks["masked_is_removed"], checks["planned"], pruned.get("differs")]
    return next((f"no: {_short(p)}" for p in problems if p), "yes")


def _alone(values: dict[str, Any]) -> str:
    at = f", {_percent(values['reached'])}" if "reached" in values else ""
    return f"{values['outcome']}{at}"


def _torch_pruning(row: dict[str, Any]) -> str:
    values = row.get("torch_pruning", {})
    if "timeout" in values:
        return f"hang ({values['timeout']} s)"
    return "crash" if failure(values) else _alone(values) if values else ""


def _passes(row: dict[str, Any]) -> str:
    spent, once = row.get("half", {}).get("s"), row.get("forward", {}).get("s")
    return f"{spent / once:.0f}" if spent and once else ""


def _excluded(values: dict[str, Any]) -> str:
    return ", ".join(f"{n} {kind}" for kind, n in values["excluded"].items())


def _planted(values: dict[str, Any]) -> str:
    problem = values["off"] or (values["live"] and f"live channels of {', '.join(values['live'])} went")
    return f"no: {_short(problem)}" if problem else f"unchanged at {_percent(values['reached'])}"


COLUMNS: dict[str, Any] = {
    "network": "{network}",
    "GMACs": _of("forward", lambda v: f"{v['macs'] / 1e9:.3g}"),
    "pass s": _of("forward", lambda v: f"{v['s']:.3f}"),
    "groups found s": _of("discovery", lambda v: f"{v['s']:.2f}"),
    "and verified s": _of("verified", lambda v: f"{v['s']:.2f}"),
    "groups": _of("verified", lambda v: v["groups"]),
    "left out": _of("verified", _excluded),
    "within reach %": _of("verified", lambda v: _percent(v["reach"])),
    "least %": _of("verified", lambda v: _percent(v.get("floor", 1.0))),
    "half met": _of("half", _half),
    "masked = removed": _agrees,
    "`prune()`, passes": _passes,
    "Torch-Pruning alone": _torch_pruning,
}
CHECKS: dict[str, Any] = {
    "network": "{network}",
    "shifts caught": _of("oracle", lambda v: "{}/{}".format(*v["shifts_caught"])),
    "costs exact": _of("oracle", lambda v: f"{v['costs_exact']}/2"),
    "budgets met": _of("oracle", lambda v: " ".join(f"{a} {met}/{n}" for a, (met, n) in v["budgets"].items())),
    "dead channels": _of("planted", _planted),
}


def by_network(rows: Rows) -> str:
    return listing(in_order(rows), COLUMNS)


def checks(rows: Rows) -> str:
    return listing([r for r in in_order(rows) if "shifts_caught" in r.get("oracle", {})], CHECKS)


def quick(rows: Rows) -> str:
    """The networks that have a limit on the time of the search."""

    def limit(row: dict[str, Any]) -> float:
        return PASSES * row["forward"]["s"] + SECONDS

    columns = {
        "network": "{network}",
        "pass s": "{forward[s]:.3f}",
        "groups found s": COLUMNS["groups found s"],
        "and verified s": COLUMNS["and verified s"],
        "limit s": lambda row: f"{limit(row):.2f}",
        "kept": lambda row: "yes" if row.get("verified", {}).get("s", float("inf")) <= limit(row) else "no",
        "within reach %": COLUMNS["within reach %"],
    }
    return listing(
        [r for r in in_order(rows) if CATALOGUE[r["network"]].quick and "s" in r.get("forward", {})], columns
    )


def in_order(rows: Rows) -> Rows:
    """As in the catalogue; a network that has left it is left out."""
    order = list(CATALOGUE)
    return sorted((r for r in rows if r["network"] in CATALOGUE), key=lambda r: order.index(r["network"]))


EXPERIMENTS = (
    Experiment(
        "zoo",
        "prune networks of all kinds, with random weights",
        {},
        cell,
        settings={"limit": 120, "repeats": 3},
        options={"only": ""},
        show={"by-network": by_network, "quick": quick, "checks": checks},
        keys=keys,
        smoke={"only": "perceptron", "repeats": 1},
        threads=2,
        device="cpu",
    ),
)
