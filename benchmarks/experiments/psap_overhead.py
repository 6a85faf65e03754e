"""What PSAP costs per training step: masked, and with the pulse on, as ratios to a bare step of the same network.

ResNet-20 on random 32×32 images. Rounds take one step of each in turn; ratios are taken within a round, then the
median. With one CPU thread the time is that of the process, so that other load on the machine hardly touches it. Prune
steps themselves (a few per training) are timed apart.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.experiment import Experiment, Run
from benchmarks.tables import Rows, listing
from benchmarks.timing import in_turns, ratios
from tp_importance import Budget, PSAPPruner, PSAPSchedule


def stepper(kind: str, run: Run, name: str, batch: int) -> Callable[[], None]:
    """One training step, bare or under PSAP; set up so that nothing is pruned any more while it is timed."""
    torch.manual_seed(0)
    task = run.task(name)
    model = task.fresh().to(memory_format=torch.channels_last)
    x = torch.randn(batch, *task.inputs.shape[1:]).to(run.device, memory_format=torch.channels_last)
    y = (torch.arange(batch) % 10).to(run.device)
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, 0.9)
    after: Callable[[], None] = lambda: None  # noqa: E731
    if kind != "bare":
        long = 10_000
        # one prune step at once; then the pulse goes on for ever, or there is none
        schedule = PSAPSchedule(prune_steps=1, begin=1 / long, end=1 / long, pulse=long // 2 if kind == "pulse" else 0)
        pruner = PSAPPruner(model, x[:2], budget=Budget(macs=0.5), schedule=schedule)
        pruner.start(optimizer, total_steps=long)
        after = pruner.step
    model.train()

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        after()

    step()  # the prune step
    if kind != "bare":
        assert any(pruner.masked.values()) and pruner.frozen == (kind == "masked")
    return step


def cell(run: Run, key: dict[str, Any]) -> dict[str, Any]:
    """Ratios of all kinds of step."""
    steps = {kind: stepper(kind, run, key["network"], key["batch"]) for kind in ("bare", "masked", "pulse")}
    spent, _ = in_turns(steps, run.rounds, run.device, warmup=2)
    bare_s = round(statistics.median(spent["bare"]), 4)
    return {"bare_s": bare_s, **ratios(spent, "bare"), "prune_step_s": round(prune_step(run, key["network"]), 4)}


def prune_step(run: Run, name: str) -> float:
    """Time of one prune step: sparsities, widths, masks."""
    task = run.task(name)
    model = task.fresh()
    schedule = PSAPSchedule(prune_steps=5, begin=0, end=1, pulse=0)
    pruner = PSAPPruner(model, task.inputs, budget=Budget(macs=0.5), schedule=schedule)
    pruner.start(torch.optim.SGD(model.parameters(), 0.1), total_steps=5)
    spent, _ = in_turns({"step": pruner.step}, 5, run.device, warmup=0)
    return statistics.median(spent["step"])


def by_step(rows: Rows) -> str:
    columns = {
        "network": "{network}",
        "batch": "{batch}",
        "device": "{device}",
        "bare step, s": "{bare_s}",
        "step": "{step}",
        "time / bare step": "{time:.3f}",
        "quartiles": "{within[0]:.3f} to {within[1]:.3f}",
        "prune step, s": "{prune_step_s}",
    }
    kinds = [
        {**r, "step": kind, "time": time, "within": r["quartiles"][kind]}
        for r in rows
        for kind, time in r["ratio"].items()
    ]
    return listing(kinds, columns)


EXPERIMENTS = (
    Experiment(
        "psap-overhead",
        "what a training step costs under PSAP",
        {"network": ["resnet20"], "batch": [128]},
        cell,
        settings={"rounds": 30},
        show={"by-step": by_step},
        keys=lambda run: (
            {"network": n, "batch": b, "device": run.device, "threads": run.threads}
            for n in run.axis("network")
            for b in run.axis("batch")
        ),
        smoke={"batch": [8], "rounds": 2},
        threads=1,
        device="cpu",
    ),
)
