"""What ITPruner costs: one pass against a bare forward pass, a new budget, and the published double loop beside it.

Random weights: time does not depend on them. The double loop recomputes all Gram matrices for every pair of groups; it
is timed on some pairs and scaled to all.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise, product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import Cells, environment, flat, markdown, parser, read_results
from torch import Tensor, nn
from torchvision import models

from tp_importance import Budget, ITPruner
from tp_importance.batches import call_model
from tp_importance.observe import Watch, observe

FRACTIONS = np.linspace(0.2, 0.9, 15)


class Block(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out)
        self.conv2, self.bn2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False), nn.BatchNorm2d(c_out)
        same = c_in == c_out
        conv = nn.Conv2d(c_in, c_out, 1, stride, bias=False)
        self.shortcut = nn.Identity() if same else nn.Sequential(conv, nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


def resnet110() -> nn.Module:
    """ResNet-110 for 32×32 images with convolutions in the shortcuts: 54 inner groups and 3 stages."""
    widths = [16] * 19 + [32] * 18 + [64] * 18
    blocks = [Block(a, b, 1 if a == b else 2) for a, b in pairwise(widths)]
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "ResNet-50": (models.resnet50, 224),
    "MobileNetV2": (models.mobilenet_v2, 224),
    "DenseNet-121": (models.densenet121, 224),
    "EfficientNet-B0": (models.efficientnet_b0, 224),
    "ResNet-110": (resnet110, 32),
}


def hsic(x: Tensor, y: Tensor) -> Tensor:
    centre = torch.eye(len(x)) - 1 / len(x)
    return torch.trace(x @ x.T @ centre @ (y @ y.T) @ centre)


def nhsic(x: Tensor, y: Tensor) -> Tensor:
    """As in the published code: everything anew for every pair."""
    return hsic(x, y) / (hsic(x, x) * hsic(y, y)).sqrt()


def seconds(f: Callable[[], Any], repeats: int) -> float:
    f()
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        f()
        found.append(time.perf_counter() - start)
    return float(np.median(found))


def run(name: str, args: Any) -> dict[str, Any]:
    make, size = NETWORKS[name]
    torch.manual_seed(0)
    model = make().eval()
    batch = torch.randn(args.batch, 3, size, size)
    pruner = ITPruner(model, batch[:1], [batch], budget=Budget(macs=0.5), pool=args.pool)

    def forward() -> None:
        with torch.inference_mode():
            call_model(model, batch)

    bare, collect = [seconds(f, args.repeats) for f in (forward, pruner.collect)]
    solves = []
    for fraction in FRACTIONS:
        start = time.perf_counter()
        pruner.plan(Budget(macs=float(fraction)))
        solves.append(time.perf_counter() - start)
    result = {
        "groups": len(pruner.groups),
        "forward_s": bare,
        "collect_s": collect,
        "ratio": collect / bare,
        "solve_ms": float(np.median(solves)) * 1e3,
        "worst_kkt": max(p.certificate["kkt_residual"] for p in pruner.sweep(FRACTIONS.tolist())),
    }
    if args.pairs:
        result |= loop(pruner, model, batch, args.pairs)
        result["loop_over_ours"] = result["loop_s"] / collect
    return result


def loop(pruner: ITPruner, model: nn.Module, batch: Tensor, pairs: int) -> dict[str, Any]:
    features: list[Tensor] = []
    watches = [
        Watch(g.name, model.get_submodule(r.name), partial(_keep, features, torch.from_numpy(r.channels)))
        for g in pruner.groups
        for r in g.readers[:1]
    ]
    start = time.perf_counter()
    observe(model, [batch], watches, need_labels=False)
    forward = time.perf_counter() - start
    every = list(product(features, features))
    chosen = random.Random(0).sample(every, min(pairs, len(every)))
    start = time.perf_counter()
    for x, y in chosen:
        nhsic(x, y)
    return {"loop_s": forward + (time.perf_counter() - start) * len(every) / len(chosen), "pairs": len(chosen)}


def _keep(store: list[Tensor], channels: Tensor, x: Tensor, _out: Tensor, _labels: Tensor) -> None:
    store.append(x[:, channels].flatten(1))


def table(results: dict[str, Any]) -> str:
    header = ["network", "groups", "forward s", "collect s", "ratio", "new budget ms", "KKT", "double loop s", "× ours"]
    keys = ["groups", "forward_s", "collect_s", "ratio", "solve_ms", "worst_kkt", "loop_s", "loop_over_ours"]
    rows = []
    for cell in map(flat, results["cells"]):
        rows.append([cell["network"], *(f"{cell[k]:.3g}" if k in cell else "" for k in keys)])
    return markdown(header, rows)


def main() -> None:
    p = parser(__doc__, "itpruner_cost.json")
    p.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    p.add_argument("--batch", type=int, default=100)
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--pool", action="store_true")
    p.add_argument("--pairs", type=int, default=100, help="pairs of the double loop that are timed, 0 for none")
    args = p.parse_args()
    if not args.table:
        torch.set_num_threads(args.threads)
        settings = {"batch": args.batch, "pool": args.pool}
        cells = Cells(args.out, settings, environment("cpu", args.date))
        for name in args.networks:
            cells.fill({"network": name}, partial(run, name, args))
    print(table(read_results(args.out)))


if __name__ == "__main__":
    main()
