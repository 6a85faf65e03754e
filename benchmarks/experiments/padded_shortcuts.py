"""ResNets whose shortcuts are padded with zeros (option A): should the channels that run through all stages go, too?

Every cell: a budget in MACs that is met exactly, 500 training images of a draw for scores, refit and batch norms, no
training. "kept": only channels inside the blocks go. "pruned": also those of the residual stages that no padding meets
(the channels of the first stage, which every block behind it adds to). Top-1 on the first test images, and on the last
ones, which chose the default.
"""

from __future__ import annotations

from typing import Any

from benchmarks.arms import Arm, prune
from benchmarks.experiment import FOLLOWED, Experiment, Run
from benchmarks.tables import Rows, chosen, markdown, spread

ARMS = tuple(
    f"{c}{refit}" for c in ("L2, uniform", "CATRO, greedy", "OBS, greedy") for refit in ("", " + sequential refit")
)
STAGES = ("kept", "pruned")
ROOT = "conv1"
"""Group of the channels that run through all stages."""


def cell(run: Run, key: dict[str, Any]) -> dict[str, Any]:
    task = run.task(key["network"])
    if key["arm"] == "dense":
        return task.unpruned(run.n_test)
    task = task.whole if key["stages"] == "pruned" else task
    model, found = prune(task, Arm.parse(key["arm"]), task.draw(key["draw"], run.images), key["budget"])
    top1 = {"top1": task.top1(model, run.n_test), "last": task.top1(model, run.n_last, last=True)}
    widths = dict(zip(task.groups.names, found.pop("widths"), strict=True))
    return {**{name: round(value, 3) for name, value in top1.items()}, **found, "widths": widths}


def by_stages(rows: Rows) -> str:
    """One table per network: accuracy with and without the residual stages, and the width that is left of them."""
    parts = []
    budgets = sorted({r["budget"] for r in rows if "budget" in r}, reverse=True)
    for network in dict.fromkeys(r["network"] for r in rows):
        dense = chosen(rows, network=network, arm="dense")[0]["top1"]
        header = [f"{network} (dense {dense:.1f})"]
        for budget in budgets:
            header += [f"{budget:g} of the MACs, kept", "pruned", "channels left"]
        lines = []
        for arm in ARMS:
            line = [arm]
            for budget in budgets:
                mine = chosen(rows, network=network, arm=arm, budget=budget)
                line += [spread([r["top1"] for r in chosen(mine, stages=s)]) for s in STAGES]
                line.append(spread([r["widths"][ROOT] for r in chosen(mine, stages="pruned") if ROOT in r["widths"]]))
            if any(line[1:]):
                lines.append(line)
        parts.append(markdown(header, lines))
    return "\n\n".join(parts)


EXPERIMENTS = (
    Experiment(
        "option-a",
        "padded shortcuts: the residual stages pruned or kept",
        {
            "network": ["resnet20", "resnet32", "resnet56"],
            "draw": [0, 1, 2],
            "budget": [0.5, 0.3],
            "arm": ARMS,
            "stages": STAGES,
        },
        cell,
        settings={"images": 500, "n_test": 5_000, "n_last": 2_000, **FOLLOWED},
        show={"by-stages": by_stages},
        smoke={"arm": ["L2, uniform", "OBS, greedy"], "n_last": 100},
    ),
)
