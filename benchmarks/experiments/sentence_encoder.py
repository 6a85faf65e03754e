"""A sentence encoder, all-MiniLM-L6-v2, pruned in one shot: how much of its embeddings is left?

Every arm prunes the same groups under the same budget, by 512 sentences of Python's documentation; 1,000 others are
embedded by the dense and the pruned encoder and compared (:func:`benchmarks.sentences.quality`). The embedding is the
mean of the hidden states, so the hidden width stays; heads (or dimensions of heads) and MLP channels go. OBS is ours
(CATRO needs classes, which sentences have not); L1, L2, Taylor and random are Torch-Pruning's importances, on our
groups. "uniform": one ratio for all groups; "greedy": ranked over all of them. Taylor's loss is SimCSE's: a sentence
must find its own embedding under dropout among those of all sentences of the batch, about a hundred. The networks are
kept in outputs/sentence-encoder.

"sentence-encoder-latency", on a quiet machine: latency of these networks, eager and in onnxruntime. Both need
`make zoo-venv`.
"""

from __future__ import annotations

import copy
import io
import time
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from benchmarks.arms import Arm, settings
from benchmarks.cells import ROOT
from benchmarks.experiment import Experiment, Run
from benchmarks.sentences import (
    CALIBRATION,
    HELD_OUT,
    Batch,
    SentenceEncoder,
    Sentences,
    contrastive,
    embeddings,
    encoder,
    packed,
    padded,
    quality,
    with_views,
)
from benchmarks.tables import Rows, chosen, distinct, markdown
from tp_importance import Budget, BudgetPruner, load_pruned, save_pruned

ARMS = ("OBS", "L1, uniform", "L2, uniform", "Taylor, uniform", "Taylor, greedy", "random, uniform")
MEASURES = {"cosine": "cosine", "spearman": "rank correlation", "neighbour": "same neighbour"}


class Subject:
    """The dense encoder and the sentences, read once."""

    def __init__(self, run: Run) -> None:
        self.model: SentenceEncoder = encoder().to(run.device)
        self.sentences = Sentences.draw(0, run.calibration, run.held_out)
        self.calibration = self.to_device(packed(self.sentences.calibration), run)
        self.held_out = self.to_device(padded(self.sentences.held_out), run)
        self.inputs = self.to_device(padded(self.sentences.calibration[:2]), run)[0]
        self.reference = embeddings(self.model, self.held_out)

    @staticmethod
    def to_device(loader: list[Batch], run: Run) -> list[Batch]:
        return [{name: t.to(run.device) for name, t in batch.items()} for batch in loader]

    def fresh(self) -> SentenceEncoder:
        return copy.deepcopy(self.model)

    def pruner(self, arm: Arm, attention: str, model: nn.Module, loader: Any) -> BudgetPruner:
        importance = arm.importance(model, loader, [])
        if hasattr(importance, "positions"):
            importance.positions = None  # every token counts
        if hasattr(importance, "loss_fn"):
            importance.loss_fn = contrastive
        options: dict[str, Any] = {"allocator": arm.allocator, "attention": attention, "verify": verified(attention)}
        return BudgetPruner(model, self.inputs, loader, importance=importance, budget=Budget(macs=0.5), **options)


subject = cache(Subject)
VERIFIED: dict[str, dict[str, str]] = {}


def verified(attention: str) -> Any:
    """Groups are verified once per process and kind of unit; all later networks are the same."""
    if attention not in VERIFIED:
        VERIFIED[attention] = {}
        return True
    return lambda groups, inputs: {}


@cache
def planner(run: Run, name: str, attention: str) -> BudgetPruner:
    """Collects with the first cell that needs it, then it plans for every budget."""
    own, arm = subject(run), Arm.parse(name)
    loader: Any = own.calibration
    if arm.criterion.startswith("Taylor"):
        loader = with_views(own.model, loader)
    return own.pruner(arm, attention, own.fresh(), loader)


def path_of(run: Run, key: dict[str, Any]) -> Path:
    folder = ROOT / run.work
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{key['attention']}-{key['arm'].replace(', ', '-')}-{key['refit']}-{key['budget']}.pt"


def cell(run: Run, key: dict[str, Any]) -> dict[str, Any]:
    """Prune, compare, save the network."""
    own, attention = subject(run), key["attention"]
    start = time.perf_counter()
    plan = planner(run, key["arm"], attention).plan(Budget(macs=key["budget"]))
    planned = time.perf_counter() - start
    model = own.fresh()
    pruner = own.pruner(Arm.parse("random, uniform"), attention, model, own.calibration)
    start = time.perf_counter()
    report = pruner.apply(plan, refit=None if key["refit"] == "none" else settings(key["refit"], positions=None))
    spent = time.perf_counter() - start
    save_pruned(model, path_of(run, key))
    return {
        **quality(own.reference.cpu(), embeddings(model, own.held_out).cpu()),
        "macs": round(report.cost.macs / report.dense.macs, 4),
        "params": sum(p.numel() for p in model.parameters()),
        "plan_s": round(planned, 1),
        "apply_s": round(spent, 1),
        "widths": [row.after for row in report.rows],
    }


# -- latency


def latency_keys(run: Run) -> Iterator[dict[str, Any]]:
    for runtime, batch in product(run.axis("runtime"), run.axis("batch")):
        yield {"arm": "dense", "runtime": runtime, "batch": batch}
    names = ("attention", "arm", "refit", "budget", "runtime", "batch")
    yield from (dict(zip(names, values, strict=True)) for values in product(*map(run.axis, names)))


def latency(run: Run, key: dict[str, Any]) -> dict[str, Any]:
    """Of one forward pass of a finished network over held-out sentences, padded to the longest of the batch."""
    model = encoder() if key["arm"] == "dense" else load_pruned(lambda: encoder(weights=False), path_of(run, key))
    inputs = padded(Sentences.draw(0).held_out[: key["batch"]], key["batch"])[0]
    call = {"eager": eager, "onnxruntime": in_onnxruntime}[key["runtime"]](model.eval(), inputs, run.threads)
    timer = Timer("call()", globals={"call": call}, num_threads=run.threads)
    found = timer.blocked_autorange(min_run_time=run.seconds)
    low, high = np.percentile(found.times, [25, 75]) * 1e3
    return {
        "tokens": inputs["input_ids"].shape[1],
        "ms": round(found.median * 1e3, 3),
        "quartiles_ms": [round(float(low), 3), round(float(high), 3)],
    }


def eager(model: nn.Module, inputs: Batch, threads: int) -> Callable[[], Any]:
    def call() -> Tensor:
        with torch.inference_mode():
            return model(**inputs)

    return call


def in_onnxruntime(model: nn.Module, inputs: Batch, threads: int) -> Callable[[], Any]:
    """After a comparison with the eager output."""
    import onnxruntime

    file = io.BytesIO()
    program = torch.onnx.export(model, kwargs=dict(inputs), dynamo=True, verbose=False)
    assert program is not None
    program.save(file)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    feed = {i.name: inputs[i.name].numpy() for i in session.get_inputs()}
    torch.testing.assert_close(
        torch.from_numpy(session.run(None, feed)[0]), eager(model, inputs, 1)(), atol=1e-4, rtol=0
    )
    return lambda: session.run(None, feed)


# -- tables


def by_budget(rows: Rows) -> str:
    """One table per measure."""
    budgets = sorted(distinct(rows, "budget"), reverse=True)
    parts = []
    for measure, name in MEASURES.items():
        lines = []
        for attention, arm, refit in distinct(rows, "attention", "arm", "refit"):
            mine = chosen(rows, attention=attention, arm=arm, refit=refit)
            values = [next((f"{r[measure]:.3f}" for r in chosen(mine, budget=b)), "") for b in budgets]
            lines.append([UNITS[attention], arm, refit, *values])
        parts.append(markdown([name, "criterion", "refit", *(f"{100 * b:g} %" for b in budgets)], lines))
    return "\n\n".join(parts)


UNITS = {
    "heads": "heads and MLP",
    "dims": "dimensions of heads and MLP",
    "both": "heads, their dimensions and MLP",
    "none": "MLP",
}


def by_runtime(rows: Rows) -> str:
    """Milliseconds, and how much faster than the dense network."""
    columns = distinct(rows, "runtime", "batch")
    lines = []
    names = ("attention", "arm", "refit", "budget")
    for case in dict.fromkeys(tuple(r.get(n) for n in names) for r in rows):
        values = []
        for runtime, batch in columns:
            where = {"runtime": runtime, "batch": batch}
            dense = chosen(rows, arm="dense", **where)
            found = chosen(rows, **dict(zip(names, case, strict=True)), **where)
            values.append(f"{found[0]['ms']:.1f} (× {dense[0]['ms'] / found[0]['ms']:.2f})" if found and dense else "")
        attention, arm, _, budget = case
        lines.append(["dense" if budget is None else f"{arm}, {UNITS[attention]}, {100 * budget:g} %", *values])
    return markdown(["network", *(f"{runtime}, batch {batch}, ms" for runtime, batch in columns)], lines)


AXES = {
    "attention": ["heads", "none"],
    "arm": ARMS,
    "refit": ["none", "sequential"],
    "budget": [0.75, 0.6, 0.5],
}
WORK = "outputs/sentence-encoder"
TINY = {"attention": ["heads"], "arm": ["L1, uniform", "Taylor, greedy"], "refit": ["sequential"], "budget": [0.6]}
EXPERIMENTS = (
    Experiment(
        "sentence-encoder",
        "prune a sentence encoder and compare its embeddings",
        AXES,
        cell,
        settings={"calibration": CALIBRATION, "held_out": HELD_OUT},
        options={"work": WORK},  # folder for the networks
        show={"by-budget": by_budget},
        keys=lambda run: (dict(zip(AXES, values, strict=True)) for values in product(*map(run.axis, AXES))),
        smoke={**TINY, "calibration": 32, "held_out": 100},
        threads=1,
        device="cpu",
    ),
    Experiment(
        "sentence-encoder-latency",
        "latency of the pruned sentence encoders, eager and in onnxruntime",
        {**AXES, "arm": ["OBS"], "refit": ["sequential"], "runtime": ["eager", "onnxruntime"], "batch": [1, 32]},
        latency,
        options={"work": WORK, "seconds": 2.0},
        show={"by-runtime": by_runtime},
        keys=latency_keys,
        smoke={**TINY, "arm": [], "runtime": ["eager"], "batch": [1], "seconds": 0.1},
        threads=1,
        device="cpu",
    ),
)
