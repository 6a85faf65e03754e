"""Is what is promised true for any network? Random graphs, drawn by hypothesis, every one of them pruned and compared.

A cell is a block of programs that are drawn from one seed; where something is wrong, it holds the smallest program that
shows it. Cells that are there are not made again: delete their line to do so.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from benchmarks.experiment import Experiment, Run
from benchmarks.tables import Rows, listing


def cell(run: Run, key: dict[str, Any]) -> dict[str, Any]:
    from benchmarks.zoo.drawn.checks import examine
    from benchmarks.zoo.drawn.program import Program
    from benchmarks.zoo.drawn.strategy import each

    found: dict[Program, dict[str, Any]] = {}
    wrong: list[Program] = []

    def look(program: Program) -> None:
        try:
            found[program] = examine(program)
        except Exception:
            wrong.append(program)  # the last one is the smallest
            raise

    start, problem = time.perf_counter(), None
    try:
        each(look, number=run.programs, start=key["block"])
    except Exception as error:
        problem = {"program": str(wrong[-1]) if wrong else "", "error": f"{type(error).__name__}: {error}"[:400]}
    return {"s": round(time.perf_counter() - start, 1), "problem": problem, **_summary(list(found.values()))}


def _summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "graphs": len(results),
        "without_groups": sum(not r["groups"] for r in results),
        "groups": sum(r["groups"] for r in results),
        "excluded": dict(Counter(kind for r in results for kind in r["excluded"])),
        "budgets": dict(Counter(r["budget"] for r in results if "budget" in r)),
    }


def blocks(rows: Rows) -> str:
    """All blocks in one line, and those in which something is wrong below."""
    sound = [r for r in rows if not r["problem"]]
    kinds: Counter[str] = Counter()
    budgets: Counter[str] = Counter()
    for row in sound:
        kinds.update(row["excluded"])
        budgets.update(row["budgets"])
    whole = {
        "graphs": sum(r["graphs"] for r in sound),
        "groups": sum(r["groups"] for r in sound),
        "without a group": sum(r["without_groups"] for r in sound),
        "left out, in graphs": ", ".join(f"{kind} {n}" for kind, n in kinds.most_common()),
        "budgets met": budgets["met"],
        "refused, rightly": budgets["refused"],
        "blocks with a fault": len(rows) - len(sound),
    }
    table = listing([whole], {name: f"{{{name}}}" for name in whole})
    faults = [f"Block {r['block']}: {r['problem']['error'][:200]}" for r in rows if r["problem"]]
    return "\n\n".join([table, *faults])


EXPERIMENTS = (
    Experiment(
        "random-graphs",
        "prune random graphs of all kinds of layers, and check what is promised",
        {"block": range(20)},
        cell,
        settings={"programs": 25},
        show={"blocks": blocks},
        dense=False,
        smoke={"block": [0], "programs": 2},
        threads=1,
        device="cpu",
        keys=lambda run: ({"block": block} for block in run.axis("block")),
    ),
)
