"""What scoring and a whole one-shot pruning cost, as ratios to one bare forward pass, and how much memory they take.

Bare: the batches through the network in eval and inference mode. "scoring": a criterion's statistics over the same
batches and its curves, on groups that are known (tracing is not scoring). "one-shot-cost": collect, order (OBS),
allocate, refit, surgery, batch norms; "build" is tracing and verifying the groups. Rounds alternate; ratios are taken
within a round, then the median. With one CPU thread the time is that of the process: other load on the machine hardly
touches it. With several threads, or a GPU, it is the wall clock (the process also counts threads that wait).
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import torch
import torch_pruning as tp
from torch import nn

from benchmarks.experiment import Experiment, Run
from benchmarks.tables import Rows, listing, markdown
from benchmarks.timing import BATCH, Images, bare, in_turns, network, peak_mb, ratios, seconds, subject
from tp_importance import Budget, BudgetPruner, CATROImportance, OBSImportance, Refit, prunable_groups
from tp_importance.graph.groups import PrunableGroups
from tp_importance.pruning.gradient_importance import GradientImportance

CATRO: dict[str, dict[str, Any]] = {
    "CATRO channel": {"space": "channel"},
    "CATRO channel maps": {"space": "channel", "pool": False},
    "CATRO": {"space": "consumer"},
}
MODES = ("parallel", "sequential")


class Timed:
    """Mixed into an importance: writes down how long the curves take once the statistics are there."""

    solve_s = 0.0

    def value(self, groups: PrunableGroups) -> dict[str, Any]:
        device = next(groups.trace.model.parameters()).device
        start = seconds(device)
        curves = super().value(groups)  # type: ignore[misc]
        self.solve_s = seconds(device) - start
        return curves


class TimedCATRO(Timed, CATROImportance):
    pass


class TimedTaylor(Timed, GradientImportance):
    pass


def collect(importance: Any, model: nn.Module, batches: Any, groups: PrunableGroups) -> float:
    return importance.collect(model, None, batches, groups=groups).solve_s


def scoring_keys(run: Run) -> Iterator[dict[str, Any]]:
    yield from ({"network": name} for name in run.axis("network"))
    for name, arm, images in product(run.axis("memory_network"), ("bare", *CATRO), run.axis("image_count")):
        yield {"network": name, "arm": arm, "images": images}


def scoring(run: Run, key: dict[str, Any]) -> dict[str, Any]:
    """Ratios of all criteria on one network, or the peak memory of one."""
    if "arm" in key:
        return {"peak_mb": round(run.probe(key))}
    model, batches = subject(key["network"], run)
    groups = prunable_groups(model, batches[0][0][:1])
    work: dict[str, Callable[[], Any]] = {"bare": partial(bare, model, batches)}
    scored = {name: partial(TimedCATRO, **options) for name, options in CATRO.items()}
    scored["Taylor"] = partial(TimedTaylor, tp.importance.TaylorImportance(normalizer=None))
    work.update({name: lambda make=make: collect(make(), model, batches, groups) for name, make in scored.items()})
    spent, found = in_turns(work, run.rounds, run.device)
    return {
        "images": sum(len(y) for _, y in batches),
        "groups": len(groups),
        "bare_s": round(statistics.median(spent["bare"]), 4),
        **ratios(spent, "bare"),
        "solve_s": {c: round(statistics.median(solved), 4) for c, solved in found.items() if c != "bare"},
    }


def scoring_probe(run: Run, key: dict[str, Any]) -> float:
    model, size = network(key["network"], run)
    loader = Images(key["images"], size, BATCH[key["network"]])
    groups = prunable_groups(model, torch.zeros(1, 3, size, size))
    if key["arm"] == "bare":
        return peak_mb(partial(bare, model, loader), model, size)
    importance = CATROImportance(**CATRO[key["arm"]])
    return peak_mb(lambda: importance.collect(model, None, loader, groups=groups), model, size)


def pruned(model: nn.Module, batches: Any, x: torch.Tensor, mode: str, memory: int) -> tuple[float, float, int]:
    """Seconds to build the pruner and for its step, and passes of the refit."""
    start = seconds(x.device)
    pruner = BudgetPruner(model, x, batches, importance=OBSImportance(), budget=Budget(macs=0.5))
    built = seconds(x.device)
    report = pruner.step(refit=Refit(mode, memory_limit=memory << 30))  # type: ignore[arg-type]
    assert report.refit is not None
    return built - start, seconds(x.device) - built, report.refit.passes


def one_shot_keys(run: Run) -> Iterator[dict[str, Any]]:
    yield from ({"network": name} for name in run.axis("network"))
    for name in run.axis("memory_network"):
        for images in [64] if name == "resnet50" else run.axis("image_count"):
            yield {"network": name, "refit": "parallel", "images": images}


def one_shot(run: Run, key: dict[str, Any]) -> dict[str, Any]:
    """Ratios of both refits on one network, or the peak memory of one."""
    if "refit" in key:
        return {"peak_mb": round(run.probe(key))}
    model, batches = subject(key["network"], run)
    work: dict[str, Callable[[], Any]] = {"bare": partial(bare, model, batches)}
    for mode in MODES:
        work[mode] = lambda mode=mode: pruned(copy.deepcopy(model), batches, batches[0][0][:1], mode, run.memory)
    spent, found = in_turns(work, run.rounds, run.device, warmup=0 if run.smoke else 1)
    stepped = {"bare": spent["bare"], **{m: [step for _, step, _ in found[m]] for m in MODES}}
    return {
        "images": sum(len(y) for _, y in batches),
        "bare_s": round(statistics.median(spent["bare"]), 3),
        "build_s": round(statistics.median(built for built, *_ in found[MODES[-1]]), 3),
        "ratio": ratios(stepped, "bare", 2)["ratio"],
        "passes": {m: found[m][0][2] for m in MODES},
    }


def one_shot_probe(run: Run, key: dict[str, Any]) -> float:
    model, size = network(key["network"], run)
    loader, x = Images(key["images"], size, BATCH[key["network"]]), torch.zeros(1, 3, size, size)
    return peak_mb(lambda: pruned(model, loader, x, key["refit"], run.memory), model, size)


def times(rows: Rows) -> str:
    lines = []
    for r in (r for r in rows if "ratio" in r):
        for c, ratio in r["ratio"].items():
            low, high = r["quartiles"][c]
            solve = r["solve_s"][c]
            without = f"{ratio - solve / r['bare_s']:.2f}"
            quartiles = f"{low:.2f} to {high:.2f}"
            lines.append([r["network"], r["images"], c, f"{ratio:.2f}", quartiles, without, f"{solve:.2f}"])
    header = ["network", "images", "criterion", "time / bare pass", "quartiles", "without the curves", "curves, s"]
    return markdown(header, lines)


def peaks(rows: Rows) -> str:
    found: dict[tuple[str, str], dict[int, int]] = {}
    for r in (r for r in rows if "peak_mb" in r):
        found.setdefault((r["network"], r["arm"]), {})[r["images"]] = r["peak_mb"]
    counts = sorted({n for row in found.values() for n in row})
    lines = [[*key, *(row.get(n, "") for n in counts)] for key, row in found.items()]
    return markdown(["network", "criterion", *(f"peak MB over {n} images" for n in counts)], lines)


def one_shot_times(rows: Rows) -> str:
    columns = {
        "network": "{network}",
        "images": "{images}",
        "refit": "{refit}",
        "time / bare pass": "{time:.1f}",
        "passes of the refit": "{n}",
        "bare pass, s": "{bare_s:.2f}",
        "build, s": "{build_s:.2f}",
    }
    timed = [r for r in rows if "ratio" in r]
    return listing(
        [{**r, "refit": m, "time": r["ratio"][m], "n": r["passes"][m]} for r in timed for m in MODES], columns
    )


def one_shot_peaks(rows: Rows) -> str:
    columns = {"network": "{network}", "refit": "{refit}", "images": "{images}", "peak MB": "{peak_mb}"}
    return listing([r for r in rows if "peak_mb" in r], columns)


SMOKE = {"network": ["resnet8"], "memory_network": [], "image_count": [16], "images": 16, "rounds": 1}
SCORING = Experiment(
    "scoring",
    "what scoring costs",
    {"network": ["resnet56", "resnet50", "mobilenet_v2"], "memory_network": ["resnet56"], "image_count": [100, 1000]},
    scoring,
    settings={"images": 32, "rounds": 5, "threads": 8, "device": "cpu"},
    show={"times": times, "peaks": peaks},
    keys=scoring_keys,
    smoke=SMOKE,
    threads=8,
    device="cpu",
    probe=scoring_probe,
)
EXPERIMENTS = (
    SCORING,
    replace(
        SCORING,
        name="scoring-2threads",
        about="the same on two threads",
        axes={**SCORING.axes, "network": ["resnet56"]},
        settings={**SCORING.settings, "threads": 2},
        threads=2,
    ),
    Experiment(
        "one-shot-cost",
        "what a whole one-shot pruning costs",
        {"network": ["resnet56"], "memory_network": ["resnet56", "resnet50"], "image_count": [100, 1000]},
        one_shot,
        settings={"images": 32, "rounds": 3, "threads": 1, "memory": 4},  # GiB a refit may take for activations
        show={"times": one_shot_times, "peaks": one_shot_peaks},
        keys=one_shot_keys,
        smoke={**SMOKE, "memory_network": ["resnet8"]},
        device="cpu",
        threads=1,
        probe=one_shot_probe,
    ),
)
