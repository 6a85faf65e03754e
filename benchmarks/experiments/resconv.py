"""Fewer layers against fewer channels on a pretrained CIFAR-10 ResNet, at equal MACs and equal training.

Every arm starts from the pretrained network and sees the same number of training images. Layers go either after
training with L1 on their scaling factors (the paper's way), or at once, by what the output loses (ours); the rest of
the images fine-tunes. Channels go at once: L2 with one ratio, and CATRO. The networks are kept in outputs/resconv.
"resconv-latency", on a quiet machine: latency and peak memory of a forward pass of the networks that are there, batch
norms folded into the convolutions in all of them.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer

from benchmarks.arms import Arm
from benchmarks.cells import ROOT
from benchmarks.experiment import FOLLOWED, Experiment, Run, find
from benchmarks.tables import Rows, markdown
from benchmarks.tasks import Task
from benchmarks.timing import in_turns, ratios
from benchmarks.training import train
from tp_importance import Budget, ResConvPruner, count_ops, fuse, load_pruned, save_pruned

ARMS = ("layers, L1", "layers, output", "channels, L2", "channels, CATRO")


def path_of(run: Run, key: dict[str, Any]) -> Path:
    folder = ROOT / run.work
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{key['network']}-{key['arm'].replace(', ', '-')}-{key['budget']}-{key['draw']}.pt"


def cell(run: Run, key: dict[str, Any]) -> dict[str, Any]:
    """Prune, train on what is left of the images, measure the accuracy, save the network."""
    task, arm, seed = run.task(key["network"]), key["arm"], key.get("draw", 0)
    if arm == "dense":
        found = task.unpruned(run.n_test)
        return {"at_once": 0.0, **found, "top1": round(found["top1"], 2)}
    warnings.filterwarnings("ignore", message=".*batch norm.*")
    loader, budget, spent = task.draw(seed, run.images), Budget(macs=key["budget"]), 0
    if arm == "layers, L1":
        spent = run.train_images // 2
    model = sparse(run, task, spent, seed) if spent else task.fresh()
    if arm.startswith("layers"):
        importance: Any = "output" if arm == "layers, output" else "scale"
        pruner = ResConvPruner(model, task.inputs, loader, budget=budget, importance=importance)
        report: Any = pruner.step(fuse=False, refit="batchnorm")
        what = {"removed": report.removed, "collapsed": list(report.collapsed)}
    else:
        channels = Arm.parse(arm.removeprefix("channels, ")).pruner(task, model, loader, key["budget"])
        report = channels.step(refit="batchnorm")
        what = {"widths": [row.after for row in report.rows]}
    at_once = task.top1(model, run.n_test)
    train(task, model, run.train_images - spent, lr=run.lr, seed=seed + 1).run()
    model.eval()
    if arm.startswith("layers"):
        fuse(model)
    macs, params = count_ops(model, task.inputs)
    save_pruned(model.cpu(), path_of(run, key))
    top1 = task.top1(model.to(run.device), run.n_test)
    return {"at_once": round(at_once, 2), "top1": round(top1, 2), "macs": macs, "params": params, **what}


def planning(run: Run, network: str, images: int = 500, rounds: int = 3) -> dict[str, Any]:
    """How long the whole ``plan()`` by the output takes, as a ratio to a bare pass over the same images."""
    task = run.task(network)
    loader, model = task.draw(0, images), task.fresh()
    pruner = ResConvPruner(task.fresh(), task.inputs, loader, budget=Budget(macs=0.5), importance="output")

    def bare() -> None:
        with torch.inference_mode():
            for x, _ in loader:
                model(x)

    spent, plans = in_turns({"bare": bare, "plan": pruner.plan}, rounds, run.device)
    return {"network": network, "images": images, "removed": plans["plan"][-1].removed, **ratios(spent, "bare")}


def sparse(run: Run, task: Task, images: int, seed: int) -> nn.Module:
    """The converted network after training with L1 on the scaling factors; kept, as all budgets start from it."""
    model = task.fresh()
    pruner = ResConvPruner(model, task.inputs, budget=Budget(macs=0.5), reg=run.reg)
    path = path_of(run, {"network": task.name, "arm": "sparse", "budget": f"{images}-{run.reg}", "draw": seed})
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
    else:
        groups = pruner.parameter_groups(weight_decay=5e-4, lr=run.scalar_lr)
        job = train(task, model, images, lr=run.lr, seed=seed, groups=groups)
        job.run(after=lambda: pruner.regularize(job.optimizer))
        torch.save(model.state_dict(), path)
    values = {n: (round(v.s.item(), 3), round(v.a.item(), 3)) for n, v in pruner.layers.items()}
    top1 = task.top1(model, run.n_test)
    print(f"{task.name} after L1 on {images} images: top-1 {top1:.2f}, (s, a): {values}", flush=True)
    return model


def latency_keys(run: Run) -> Iterator[dict[str, Any]]:
    for network, batch in product(run.axis("network"), run.axis("batch")):
        yield {"network": network, "arm": "dense", "batch": batch}
    for values in product(*map(run.axis, ("network", "budget", "arm", "draw", "batch"))):
        yield dict(zip(("network", "budget", "arm", "draw", "batch"), values, strict=True))


def latency(run: Run, key: dict[str, Any]) -> dict[str, Any]:
    """Of one forward pass of a finished network."""
    task = run.task(key["network"])
    model = task.fresh() if key["arm"] == "dense" else load_pruned(task.fresh, path_of(run, key))
    model = folded(model.eval())
    x = torch.randn(key["batch"], *task.inputs.shape[1:])
    with torch.inference_mode():
        timer = Timer("model(x)", globals={"model": model, "x": x}, num_threads=run.threads)
        found = timer.blocked_autorange(min_run_time=run.seconds)
    low, high = np.percentile(found.times, [25, 75]) * 1e3
    return {
        "ms": round(found.median * 1e3, 4),
        "quartiles_ms": [round(float(low), 4), round(float(high), 4)],
        "runs": len(found.times) * found.number_per_run,
        "peak_mb": round(peak_bytes(model, x) / 2**20, 4),
    }


def folded(model: nn.Module) -> nn.Module:
    """Batch norms folded into the convolutions before them, by torch.fx: what an inference engine does."""
    from torch.fx.experimental.optimization import fuse as fold_batchnorms

    return fold_batchnorms(copy.deepcopy(model))


def peak_bytes(model: nn.Module, x: Tensor) -> int:
    """Largest sum of bytes allocated during a forward pass, parameters and input not counted."""
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        model(x)
    assert record.profiler is not None and record.profiler.kineto_results is not None
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return int(np.cumsum(sizes).max(initial=0))


def by_arm(rows: Rows) -> str:
    """Accuracy, cost, latency and memory per arm."""
    timed = {(r["network"], r["arm"], r.get("budget"), r["batch"]): r for r in find("resconv-latency").rows()}
    batches = sorted({key[3] for key in timed})
    timings = [f"{what}, batch {b}" for b in batches for what in ("ms", "peak MB")]
    lines = []
    for r in sorted(rows, key=lambda r: (r["network"], -r.get("budget", 1.0))):
        at_once = f"{r['at_once']:.2f}" if "budget" in r else ""
        cost = [f"{r['macs'] / 1e6:.2f} M", f"{r['params'] / 1e6:.3f} M"]
        line = [r["network"], f"{r.get('budget', 1):g}", r["arm"], at_once, f"{r['top1']:.2f}", *cost]
        for b in batches:
            t = timed.get((r["network"], r["arm"], r.get("budget"), b))
            line += [f"{t['ms']:.3f}", f"{t['peak_mb']:.2f}"] if t else ["", ""]
        lines.append(line)
    return markdown(["network", "MACs kept", "arm", "at once", "top-1", "MACs", "params", *timings], lines)


AXES: dict[str, Any] = {"network": ["resnet56"], "budget": [0.7, 0.5], "arm": ARMS, "draw": [0]}
SETTINGS = {"train_images": 30_000, "images": 200, "lr": 0.02, "scalar_lr": 0.1, "reg": 0.1, "n_test": 5_000}
SMOKE = {"budget": [0.7], "train_images": 256}
EXPERIMENTS = (
    Experiment(
        "resconv",
        "fewer layers against fewer channels on CIFAR-10",
        AXES,
        cell,
        settings={**SETTINGS, **FOLLOWED},
        options={"work": "outputs/resconv"},
        show={"by-arm": by_arm},
        smoke=SMOKE,
    ),
    Experiment(
        "resconv-latency",
        "latency and memory of the networks that resconv has made",
        {**AXES, "batch": [1, 64]},
        latency,
        settings={**SETTINGS, **FOLLOWED, "threads": 1},
        options={"seconds": 5.0, "work": "outputs/resconv"},
        keys=latency_keys,
        smoke={**SMOKE, "arm": [], "batch": [1], "seconds": 0.1},
        threads=1,
        device="cpu",
    ),
)
