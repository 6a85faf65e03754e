"""Pruning while training on scikit-learn's digits: what adaptive ratios and protection add, beside the hosts' own ways.

The small residual CNN of examples/quickstart.py, 898 training and 899 test images. From pretrained weights (15 epochs,
then 10 of pruning at learning rate 0.02) and from scratch (25 epochs at 0.05). All arms take the same number of
optimizer steps with the same batches and learning rates, and prune at the same iterations. Top-1 after the last epoch.
"""

from __future__ import annotations

import copy
import time
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from common import ROOT, Cells, environment, flat, load_module, markdown, parser, read_results
from prune_training import ARMS, Training, prune
from torch import Tensor, nn

from tp_importance import count_ops

quickstart = load_module(ROOT / "examples" / "quickstart.py")

STARTS = {"pretrained": (10, 0.02), "scratch": (25, 0.05)}
"""Epochs and learning rate."""
PRETRAINING = (15, 0.05)


@cache
def data(seed: int) -> tuple[Any, Any, Any]:
    return quickstart.digits(seed)


@cache
def start_network(start: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = quickstart.build()
    if start == "pretrained":
        quickstart.train(model, data(seed)[0], *PRETRAINING, seed)
    return model


def run(start: str, kept: float, arm: str, seed: int) -> dict[str, Any]:
    """One cell of the table."""
    training, _, test = data(seed)
    epochs, lr = STARTS[start]
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(len(training), generator=generator) for _ in range(epochs)]).tolist()
    model = copy.deepcopy(start_network(start, seed))
    before = quickstart.accuracy(model, test)

    def batch(iteration: int) -> tuple[Tensor, Tensor]:
        return training[order[iteration]]

    dense = count_ops(model, training[0][0][:2])[0]
    job = Training(model, training[0][0][:2], batch, len(order), lr)
    torch.manual_seed(seed)
    began = time.perf_counter()
    found = prune(arm, job, kept)
    seconds = time.perf_counter() - began
    assert job.iteration == len(order)
    macs = count_ops(job.model, job.x)[0]
    assert arm == "dense" or macs <= kept * dense, (arm, macs / dense)
    return {
        "top1": round(quickstart.accuracy(job.model, test), 3),
        "before": round(before, 3),
        "macs": macs / dense,
        "steps": len(order),
        "seconds": round(seconds, 1),
        **found,
    }


def table(results: dict[str, Any]) -> str:
    """Mean ± standard deviation over seeds."""
    cells = [flat(cell) for cell in results["cells"]]
    columns = sorted({(c["start"], c["kept"]) for c in cells if c["arm"] != "dense"}, key=lambda k: (k[0], -k[1]))
    rows = []
    for arm in ARMS:
        row = [arm]
        for start, kept in columns:
            mine = [c for c in cells if c["arm"] == arm and c["start"] == start and c["kept"] in (kept, 1.0)]
            top1 = [c["top1"] for c in mine]
            text = f"{np.mean(top1):.2f}" + (f" ± {np.std(top1, ddof=1):.2f}" if len(top1) > 1 else "") if top1 else ""
            restored = [c["restored"] for c in mine if c.get("restored")]
            row.append(text + (f" ({np.mean(restored):.0f})" if restored else ""))
        rows.append(row)
    header = ["arm", *(f"{start}, {kept:g} of the MACs" for start, kept in columns)]
    return markdown(header, rows) + "\n\n" + contrasts(cells)


CONTRASTS = {
    "protection, adaptive ratios": ("PSAP", "PSAP, no protection"),
    "protection, uniform ratios": ("PSAP, uniform ratios", "PSAP, uniform ratios, no protection"),
    "adaptive ratios, protected": ("PSAP", "PSAP, uniform ratios"),
    "adaptive ratios, unprotected": ("PSAP, no protection", "PSAP, uniform ratios, no protection"),
    "PSAP over Torch-Pruning iterative L2": ("PSAP", "Torch-Pruning iterative L2"),
    "PSAP unprotected over Torch-Pruning iterative L2": ("PSAP, no protection", "Torch-Pruning iterative L2"),
}
"""What is added, and the two arms that differ by it."""


def contrasts(cells: list[dict[str, Any]]) -> str:
    """Differences within a start, a budget and a seed: mean ± standard error, and how many are above and below 0."""
    top1 = {(c["start"], c["kept"], c["seed"], c["arm"]): c["top1"] for c in cells}
    rows = []
    for what, (one, other) in CONTRASTS.items():
        pairs = [(v, top1.get((*k[:3], other))) for k, v in top1.items() if k[3] == one]
        found = [a - b for a, b in pairs if b is not None]
        if len(found) > 1:
            spread = np.std(found, ddof=1) / len(found) ** 0.5
            signs = f"{sum(d > 0 for d in found)} / {sum(d < 0 for d in found)} of {len(found)}"
            rows.append([what, f"{np.mean(found):+.2f} ± {spread:.2f}", signs])
    return markdown(["what is added", "points", "better / worse"], rows)


def main() -> None:
    p = parser(__doc__, "psap_digits.json")
    p.set_defaults(threads=1)
    p.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    p.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS))
    p.add_argument("--macs", type=float, nargs="+", default=[0.5, 0.2], help="fractions of the MACs that are kept")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of split, initial weights and batches")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    if not args.table:
        settings = {"starts": {k: list(v) for k, v in STARTS.items()}, "pretraining": list(PRETRAINING)}
        cells = Cells(args.out, settings, environment("cpu", args.date))
        for seed in args.seeds:
            for start in args.starts:
                for arm in args.arms:
                    for kept in [1.0] if arm == "dense" else args.macs:
                        key = {"start": start, "kept": kept, "arm": arm, "seed": seed}
                        cells.fill(key, partial(run, start, kept, arm, seed))
    print(table(read_results(args.out)))


if __name__ == "__main__":
    main()
