"""What scoring costs, as a ratio to one bare forward pass over the same images, and how much memory it takes.

Bare: the batches through the network in eval and inference mode. A criterion: its statistics over the same batches and
its curves, on groups that are known (tracing is not scoring). Rounds alternate over bare pass and criteria; ratios are
taken within a round, then the median. With one CPU thread the time is that of the process: other load on the machine
hardly touches it. With several threads, or a GPU, it is the wall clock (the process also counts threads that wait).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from cifar import Batches, Cifar10, network
from common import Cells, add_data_arguments, environment, flat, markdown, parser, read_results
from host_criteria import accumulate_gradients
from torch import nn
from torchvision import models

from tp_importance import CATROImportance, prunable_groups
from tp_importance.allocation.curves import value_curves
from tp_importance.graph.groups import PrunableGroups

CATRO: dict[str, dict[str, Any]] = {
    "CATRO channel": {"space": "channel"},
    "CATRO channel, maps": {"space": "channel", "pool": False},
    "CATRO consumer": {"space": "consumer"},
}
NETWORKS = ("resnet56", "resnet50", "mobilenet_v2")
BATCH = {"resnet56": 100, "resnet50": 16, "mobilenet_v2": 16}


class Images:
    """Re-iterable random batches, made when they are asked for: they take no memory of their own."""

    def __init__(self, n: int, size: int, batch_size: int, device: str = "cpu") -> None:
        self.n, self.size, self.batch_size, self.device = n, size, batch_size, device

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for start in range(0, self.n, self.batch_size):
            count = min(self.batch_size, self.n - start)
            x = torch.randn(count, 3, self.size, self.size, generator=torch.Generator().manual_seed(start))
            yield x.to(self.device), (torch.arange(count) % 10).to(self.device)


def subject(name: str, args: argparse.Namespace) -> tuple[nn.Module, Batches]:
    """The network and the images it is timed on."""
    torch.manual_seed(0)
    if name == "resnet56":
        model = network(args.data_root, name).to(args.device)
        try:
            batches: Any = Cifar10.load(args.data_root, args.npz).draw(0, 500, BATCH[name])
        except SystemExit as missing:
            print(missing, "- random images instead")
            batches = Images(500, 32, BATCH[name])
    else:
        model = getattr(models, name)().eval().to(args.device)
        batches = Images(args.images, 224, BATCH[name])
    return model, [(x.to(args.device), y.to(args.device)) for x, y in batches]


def bare(model: nn.Module, batches: Any) -> None:
    model.eval()
    with torch.inference_mode():
        for x, _ in batches:
            model(x)


class Timed(CATROImportance):
    """Writes down how long the curves take once the statistics are there."""

    solve_s = 0.0

    def value(self, groups: PrunableGroups) -> dict[str, Any]:
        device = next(groups.trace.model.parameters()).device
        start = seconds(device)
        curves = super().value(groups)
        self.solve_s = seconds(device) - start
        return curves


def catro(options: dict[str, Any], model: nn.Module, batches: Any, groups: PrunableGroups) -> float:
    return Timed(**options).collect(model, None, batches, groups=groups).solve_s


def taylor(model: nn.Module, batches: Any, groups: PrunableGroups) -> float:
    device = batches[0][0].device
    accumulate_gradients(model, batches)
    start = seconds(device)
    value_curves(tp.importance.TaylorImportance(normalizer=None), groups)
    spent = seconds(device) - start
    model.zero_grad()
    return spent


def seconds(device: torch.device | str) -> float:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Ratios of all criteria on one network."""
    model, batches = subject(name, args)
    groups = prunable_groups(model, batches[0][0][:1])
    runs: dict[str, Callable[[], Any]] = {"bare": partial(bare, model, batches)}
    runs.update({c: partial(catro, options, model, batches, groups) for c, options in CATRO.items()})
    runs["Taylor"] = partial(taylor, model, batches, groups)
    spent: dict[str, list[float]] = {c: [] for c in runs}
    solve: dict[str, list[float]] = {c: [] for c in runs}
    for round_ in range(args.rounds + 1):  # the first one warms up
        for criterion, work in runs.items():
            start = seconds(args.device)
            solved = work()
            if round_:
                spent[criterion].append(seconds(args.device) - start)
                solve[criterion].append(solved or 0.0)
    ratios = {c: [s / b for s, b in zip(spent[c], spent["bare"], strict=True)] for c in runs if c != "bare"}
    return {
        "images": sum(len(y) for _, y in batches),
        "groups": len(groups),
        "bare_s": round(statistics.median(spent["bare"]), 4),
        "ratio": {c: round(statistics.median(r), 3) for c, r in ratios.items()},
        "quartiles": {c: [round(q, 3) for q in statistics.quantiles(r, n=4)[::2]] for c, r in ratios.items()},
        "solve_s": {c: round(statistics.median(solve[c]), 4) for c in ratios},
    }


def memory_probe(name: str, criterion: str, images: int, args: argparse.Namespace) -> float:
    """MB that a pass adds at its peak to what the process holds before; meant for a fresh process (Linux)."""
    if name == "resnet56":
        model, size = network(args.data_root, name), 32
    else:
        model, size = getattr(models, name)().eval(), 224
    loader = Images(images, size, BATCH[name])
    groups = prunable_groups(model, torch.zeros(1, 3, size, size))
    bare(model, Images(2, size, 2))  # whatever the first pass allocates for good
    Path("/proc/self/clear_refs").write_text("5")  # forget earlier peaks; getrusage would keep the parent's
    before = status_mb("VmRSS")
    if criterion == "bare":
        bare(model, loader)
    else:
        CATROImportance(**CATRO[criterion]).collect(model, None, loader, groups=groups)
    return status_mb("VmHWM") - before


def status_mb(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def memory(name: str, criterion: str, images: int, args: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__).resolve()), "--probe", name, criterion, str(images)]
    command += ["--data-root", str(args.data_root), "--threads", str(args.threads)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {"peak_mb": round(float(out.split()[-1]))}


def table(results: dict[str, Any]) -> str:
    timed, peaks = [], {}
    for cell in map(flat, results["cells"]):
        if "peak_mb" in cell:
            peaks.setdefault((cell["network"], cell["criterion"]), {})[cell["images"]] = cell["peak_mb"]
            continue
        for c, ratio in cell["ratio"].items():
            low, high = cell["quartiles"][c]
            solve, bare_s, n = cell["solve_s"][c], cell["bare_s"], cell["images"]
            pass_ = ratio - solve / bare_s
            timed.append(
                [cell["network"], n, c, f"{ratio:.2f}", f"{low:.2f} to {high:.2f}", f"{pass_:.2f}", f"{solve:.2f}"]
            )
    header = ["network", "images", "criterion", "time / bare pass", "quartiles", "without the curves", "curves, s"]
    counts = sorted({n for row in peaks.values() for n in row})
    rows = [[*key, *(row.get(n, "") for n in counts)] for key, row in peaks.items()]
    peak = markdown(["network", "criterion", *(f"peak MB over {n} images" for n in counts)], rows)
    return markdown(header, timed) + "\n\n" + peak


def main() -> None:
    p = parser(__doc__, "scoring_cost.json")
    add_data_arguments(p)
    p.set_defaults(threads=1)
    p.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    p.add_argument("--images", type=int, default=32, help="images of 224×224; CIFAR: 500")
    p.add_argument("--rounds", type=int, default=9)
    p.add_argument("--device", default="cpu")
    p.add_argument("--memory", nargs="*", choices=NETWORKS, default=["resnet56"], help="networks for peak memory (CPU)")
    p.add_argument("--probe", nargs=3, metavar=("NETWORK", "CRITERION", "IMAGES"), help=argparse.SUPPRESS)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    if args.probe:
        print(memory_probe(args.probe[0], args.probe[1], int(args.probe[2]), args))
        return
    if not args.table:
        clock = "process" if args.device == "cpu" and args.threads == 1 else "wall"
        settings = {"images": args.images, "rounds": args.rounds, "threads": args.threads, "device": args.device}
        settings["clock"] = clock
        cells = Cells(args.out, settings, environment(args.device, args.date))
        for name in args.networks:
            cells.fill({"network": name}, partial(measure, name, args))
        for name in args.memory:
            for criterion in ("bare", *CATRO):
                for n in (100, 1000):
                    key = {"network": name, "criterion": criterion, "images": n}
                    cells.fill(key, partial(memory, name, criterion, n, args))
    print(table(read_results(args.out)))


if __name__ == "__main__":
    main()
