"""What a whole one-shot pruning costs, as a ratio to one bare forward pass over the same images, and its peak memory.

The pipeline on groups that are known: collect, order (OBS), allocate, refit, surgery, batch norms; "build" is tracing
and verifying the groups. Clock and rounds as in scoring_cost.py.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cifar import network
from common import Cells, add_data_arguments, environment, flat, markdown, parser, read_results
from scoring_cost import BATCH, NETWORKS, Images, bare, seconds, status_mb, subject
from torchvision import models

from tp_importance import Budget, BudgetPruner, OBSImportance, Refit

MODES = ("parallel", "sequential")


def pruned(model: Any, batches: Any, x: torch.Tensor, mode: str, memory: int) -> tuple[float, float, int]:
    """Seconds to build the pruner and for its step, and passes of the refit."""
    start = seconds(x.device)
    pruner = BudgetPruner(model, x, batches, importance=OBSImportance(), budget=Budget(macs=0.5))
    built = seconds(x.device)
    how = Refit(mode, memory_limit=memory << 30)  # type: ignore[arg-type]
    report = pruner.step(refit=how)
    assert report.refit is not None
    return built - start, seconds(x.device) - built, report.refit.passes


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Ratios of both refits on one network."""
    model, batches = subject(name, args)
    x = batches[0][0][:1]
    rounds: list[dict[str, float]] = []
    for _ in range(args.rounds + 1):  # the first one warms up
        start = seconds(args.device)
        bare(model, batches)
        found = {"bare": seconds(args.device) - start}
        for mode in MODES:
            found["build"], found[mode], passes = pruned(copy.deepcopy(model), batches, x, mode, args.memory)
            found[f"{mode} passes"] = passes
        rounds.append(found)
    rows = rounds[1:]
    return {
        "images": sum(len(y) for _, y in batches),
        "bare_s": round(statistics.median(r["bare"] for r in rows), 3),
        "build_s": round(statistics.median(r["build"] for r in rows), 3),
        "ratio": {m: round(statistics.median(r[m] / r["bare"] for r in rows), 2) for m in MODES},
        "passes": {m: rows[0][f"{m} passes"] for m in MODES},
    }


def probe(name: str, mode: str, images: int, args: argparse.Namespace) -> float:
    """MB that pruning adds at its peak to what the process holds before; meant for a fresh process (Linux)."""
    size = 32 if name == "resnet56" else 224
    model = network(args.data_root, name) if name == "resnet56" else getattr(models, name)().eval()
    bare(model, Images(2, size, 2))
    Path("/proc/self/clear_refs").write_text("5")
    before = status_mb("VmRSS")
    pruned(model, Images(images, size, BATCH[name]), torch.zeros(1, 3, size, size), mode, args.memory)
    return status_mb("VmHWM") - before


def memory(name: str, mode: str, images: int, args: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__).resolve()), "--probe", name, mode, str(images)]
    command += ["--data-root", str(args.data_root), "--threads", str(args.threads), "--memory", str(args.memory)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {"peak_mb": round(float(out.split()[-1]))}


def table(results: dict[str, Any]) -> str:
    cells = [flat(c) for c in results["cells"]]
    timed = [
        [
            c["network"],
            c["images"],
            m,
            f"{c['ratio'][m]:.1f}",
            c["passes"][m],
            f"{c['bare_s']:.2f}",
            f"{c['build_s']:.2f}",
        ]
        for c in cells
        if "ratio" in c
        for m in MODES
    ]
    header = ["network", "images", "refit", "time / bare pass", "passes of the refit", "bare pass, s", "build, s"]
    peaks = [[c["network"], c["mode"], c["images"], c["peak_mb"]] for c in cells if "peak_mb" in c]
    return markdown(header, timed) + "\n\n" + markdown(["network", "refit", "images", "peak MB"], peaks)


def main() -> None:
    p = parser(__doc__, "one_shot_cost.json")
    add_data_arguments(p)
    p.set_defaults(threads=1)
    p.add_argument("--networks", nargs="+", choices=NETWORKS, default=["resnet56"])
    p.add_argument("--images", type=int, default=32, help="images of 224×224; CIFAR: 500")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--memory", type=int, default=4, help="GiB a sequential refit may take for activations")
    p.add_argument("--device", default="cpu")
    p.add_argument("--probe", nargs=3, metavar=("NETWORK", "MODE", "IMAGES"), help=argparse.SUPPRESS)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    if args.probe:
        print(probe(args.probe[0], args.probe[1], int(args.probe[2]), args))
        return
    if not args.table:
        settings = {"images": args.images, "rounds": args.rounds, "threads": args.threads, "memory": args.memory}
        cells = Cells(args.out, settings, environment(args.device, args.date))
        for name in args.networks:
            cells.fill({"network": name}, partial(measure, name, args))
        for name, mode, n in [
            ("resnet56", "parallel", 100),
            ("resnet56", "parallel", 1000),
            ("resnet50", "parallel", 64),
        ]:
            key = {"network": name, "mode": mode, "images": n}
            cells.fill(key, partial(memory, name, mode, n, args))
    print(table(read_results(args.out)))


if __name__ == "__main__":
    main()
