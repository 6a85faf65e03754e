"""One-shot pruning without training by this package and by other libraries, in one run and on the same images.

Every cell: at most half of the MACs by our count, 500 training images of a draw, no training, top-1 on the first test
images; seconds of one thread from the dense network to the pruned one, also as a ratio to a bare pass over the images.
Rivals need ``make rivals-venv``; those that are not installed are skipped.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np

from benchmarks.arms import Arm
from benchmarks.experiment import FOLLOWED, Experiment, Run
from benchmarks.rivals import RIVALS
from benchmarks.tables import Rows, chosen, markdown, spread
from benchmarks.timing import bare, seconds
from tp_importance import Budget, count_ops, prune
from tp_importance.automl import RandomImportance

OURS: dict[str, dict[str, Any]] = {
    "OBS, sequential": {"method": "obs", "refit": "sequential"},
    "CATRO, sequential": {"method": "catro", "refit": "sequential"},
    "L2, sequential": {"method": "l2", "allocator": "uniform", "refit": "sequential"},
    "OBS, parallel": {"method": "obs", "refit": "parallel"},
    "L2": {"method": "l2", "allocator": "uniform", "refit": "batchnorm"},
    "random": {"method": "random", "allocator": "uniform", "refit": "batchnorm"},
}
LABELS = ("CATRO, sequential", "Torch-Pruning Taylor", "Torch-Pruning Hessian", "FastNAS (ModelOpt)")
ARMS = (*OURS, *RIVALS)


def keys(run: Run) -> Iterator[dict[str, Any]]:
    """The dense network, then all arms that are installed."""
    for network in run.axis("network"):
        yield {"network": network, "arm": "dense"}
        for arm in run.axis("arm"):
            if arm not in ARMS:
                raise SystemExit(f"there is no arm {arm!r}; known: {', '.join(ARMS)}")
            needed = None if arm in OURS else RIVALS[arm][0]
            if needed is not None and find_spec(needed) is None:
                print(f"skipped {arm}: there is no module {needed!r} (make rivals-venv)")
                continue
            yield from ({"network": network, "arm": arm, "draw": draw} for draw in run.axis("draw"))


def cell(run: Run, key: dict[str, Any]) -> dict[str, Any]:
    task, arm = run.task(key["network"]), key["arm"]
    if arm == "dense":
        return task.unpruned(run.n_test)
    batches, model = task.draw(key["draw"], run.images), task.fresh()
    most = run.budget * count_ops(model, task.inputs)[0]
    widths = dict(Arm.parse("L2, uniform").pruner(task, task.fresh(), batches, run.budget).plan().widths)
    bare(model, batches)  # warm
    before = pass_seconds(run, task.fresh(), batches)
    start = seconds(run.device)
    if arm in OURS:
        kept = {"ignored_layers": task.kept_in(model), "keep_padded": False}
        options = OURS[arm] | ({"method": RandomImportance(seed=key["draw"])} if arm == "random" else {})
        prune(model, task.inputs, batches, budget=Budget(macs=run.budget), **kept, **options)
    else:
        model = RIVALS[arm][1](task, model, batches, widths, most)
    spent = seconds(run.device) - start
    reference = statistics.mean([before, pass_seconds(run, task.fresh(), batches)])
    macs, params = count_ops(model, task.inputs)
    assert macs <= most, f"{arm} leaves {macs} MACs of {most}"
    found = {"top1": round(task.top1(model, run.n_test), 3), "macs": macs, "params": params}
    return {**found, "seconds": round(spent, 3), "ratio": round(spent / reference, 2), "budget": run.budget}


def pass_seconds(run: Run, model: Any, batches: Any) -> float:
    """A bare pass over the images."""
    start = seconds(run.device)
    bare(model, batches)
    return seconds(run.device) - start


def by_arm(rows: Rows) -> str:
    """One table per network, best first."""
    parts = []
    for network in dict.fromkeys(r["network"] for r in rows):
        mine = chosen(rows, network=network)
        (dense,) = chosen(mine, arm="dense")
        lines = [["dense", "", "", f"{dense['top1']:.1f}", "100.0%", "", ""]]
        found = {arm: chosen(mine, arm=arm) for arm in ARMS if chosen(mine, arm=arm)}
        for arm, cells in sorted(found.items(), key=lambda item: -np.mean([r["top1"] for r in item[1]])):
            lines.append(
                [
                    arm,
                    "this package" if arm in OURS else "another library",
                    "yes" if arm in LABELS else "no",
                    spread([r["top1"] for r in cells]),
                    f"{np.mean([r['macs'] for r in cells]) / dense['macs']:.1%}",
                    spread([r["seconds"] for r in cells]),
                    f"{np.mean([r['ratio'] for r in cells]):.0f}",
                ]
            )
        header = [network, "by", "labels", "top-1", "MACs", "seconds", "bare passes"]
        parts.append(markdown(header, lines))
    return "\n\n".join(parts)


EXPERIMENTS = (
    Experiment(
        "rivals",
        "one-shot pruning without training by this package and by other libraries",
        {"network": ["resnet20"], "arm": ARMS, "draw": [0, 1, 2]},
        cell,
        settings={"images": 500, "n_test": 5_000, "budget": 0.5, **FOLLOWED},
        show={"by-arm": by_arm},
        keys=keys,
        smoke={"budget": 0.5},
        device="cpu",
        threads=1,
    ),
)
