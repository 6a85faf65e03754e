"""One-shot pruning of pretrained CIFAR-10 ResNets with a refit: what it is worth to every criterion.

Every cell: channels inside the blocks, a budget in MACs that is met exactly, 500 training images of a draw for scores,
refit and batch norms, no training, top-1 on the first test images. Without a sequential refit batch norms follow the
change.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks.arms import REFITS, Arm, prune, settings
from benchmarks.experiment import FOLLOWED, Experiment, Run, find
from benchmarks.tables import Rows, chosen, markdown, pivot, spread

ARMS = (  # every criterion under the widths that suit it better, see docs/benchmarks.md
    *(f"{c}, uniform" for c in ("random", "L1", "L2", "FPGM", "BN scale", "Taylor")),
    "Taylor, greedy",
    "Taylor multivariable, greedy",
    "NNI L1, uniform",
    "NNI FPGM, uniform",
    "NNI Taylor, greedy",
    "PSAP, greedy",
    "ITPruner",
    "CATRO channel, greedy",
    "CATRO, greedy",
    "OBS, uniform",
    "OBS, greedy",
    "OBS by outputs, greedy",
)
METHODS = [f'method "{n}", {a}' for n in ("l1", "l2", "fpgm", "taylor", "psap") for a in ("uniform", "greedy")]
"""Arms that decide which widths a method takes by default."""
HEADER = ("no refit", "parallel", "sequential")


def cell(run: Run, key: dict[str, Any]) -> dict[str, Any]:
    task = run.task(key["network"])
    if key["arm"] == "dense":
        return task.unpruned(run.n_test)
    how = settings(key["refit"], ridge=run.given.get("ridge", "auto"))
    batches = task.draw(key["draw"], run.images)
    model, found = prune(task, Arm.parse(key["arm"]), batches, key["budget"], refit=how)
    return {"top1": round(task.top1(model, run.n_test), 3), **found}


def by_network(rows: Rows) -> str:
    """One table per network and budget."""
    parts = []
    for name, budget in sorted({(r["network"], r["budget"]) for r in rows if r["arm"] != "dense"}):
        dense = chosen(rows, network=name, arm="dense")[0]["top1"]
        header = [f"{name}, {budget:g} of the MACs (dense {dense:.1f})", *HEADER]
        mine = chosen(rows, network=name, budget=budget)
        parts.append(pivot(mine, "arm", "refit", columns=REFITS, header=header, order=[*ARMS, *METHODS]))
    return "\n\n".join(parts)


README = {
    "dense": "dense",
    "random, uniform": "random, uniform",
    "L1, uniform": "Torch-Pruning L1, uniform",
    "Taylor, greedy": "Torch-Pruning Taylor, greedy",
    "NNI FPGM, uniform": "NNI FPGM, uniform",
    "CATRO, greedy": "CATRO, greedy",
    "OBS, greedy": "**OBS, greedy** (default)",
}


def both(rows: Rows) -> str:
    """Half of the MACs, without and with a sequential refit, on two networks."""
    lines = []
    for arm, label in README.items():
        line = [label]
        for network in ("resnet20", "resnet56"):
            mine = chosen(rows, network=network, arm=arm)
            for refit in ("none", "sequential"):
                wanted = chosen(mine, budget=0.5, refit=refit) or (mine if arm == "dense" and refit == "none" else [])
                line.append(spread([r["top1"] for r in wanted]))
        lines.append([*line[:-1], f"**{line[-1]}**" if label.startswith("**") and line[-1] else line[-1]])
    return markdown(["criterion, widths", "ResNet-20", "with refit", "ResNet-56", "with refit"], lines)


def ridges(rows: Rows) -> str:
    """Few images: the ridge chosen by cross-validation, and a fixed one."""
    fixed = [{**r, "refit": f"{r['refit']}, ridge 1e-3"} for r in find("refit-50-ridge").rows() if "refit" in r]
    columns = [*REFITS, *(f"{r}, ridge 1e-3" for r in REFITS[1:])]
    mine = [r for r in rows if r["arm"] != "dense"] + fixed
    return pivot(mine, "arm", "refit", columns=columns, header=["resnet20, 50 images", *HEADER, *columns[3:]])


REFIT = Experiment(
    "refit",
    "what a least-squares refit is worth to every criterion on CIFAR-10",
    {"network": ["resnet20", "resnet56"], "draw": [0, 1, 2], "budget": [0.5], "arm": ARMS, "refit": REFITS},
    cell,
    settings={"images": 500, "n_test": 5_000, **FOLLOWED},
    show={"by-network": by_network, "both": both},
    smoke={"arm": ["L1, uniform", "OBS, greedy"], "refit": ["none", "sequential"]},
)
FIFTY = replace(
    REFIT,
    name="refit-50",
    about="the same with 50 images",
    axes={**REFIT.axes, "network": ["resnet20"], "arm": ["L1, uniform", "OBS, greedy"]},
    settings={"images": 50, "n_test": 5_000, **FOLLOWED},
    show={"ridges": ridges, "by-network": by_network},
)
EXPERIMENTS = (
    REFIT,
    FIFTY,
    replace(
        FIFTY,
        name="refit-50-ridge",
        about="the same with 50 images and a fixed ridge",
        axes={**FIFTY.axes, "refit": REFITS[1:]},
        settings={"images": 50, "n_test": 5_000, "ridge": 1e-3, **FOLLOWED},
        show={"by-network": by_network},
    ),
    replace(
        REFIT,
        name="default-widths",
        about="uniform or greedy widths: what each method takes by default",
        axes={**REFIT.axes, "network": ["resnet20"], "arm": METHODS, "refit": ["none", "sequential"]},
        settings={"images": 500, "n_test": 2_000, **FOLLOWED},
        show={"by-network": by_network},
        smoke={**REFIT.smoke, "arm": METHODS[:2]},
    ),
)
