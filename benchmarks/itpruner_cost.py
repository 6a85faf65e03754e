"""What ITPruner costs: one pass against a bare forward pass, a new budget, and the published double loop beside it.

Random weights: time does not depend on them. Bare pass, collection and what it needs for the L1 order of the channels
take turns; the ratio is taken within a round, then the median. With one CPU thread the time is that of the process.
The double loop recomputes all Gram matrices for every pair of groups; it is timed on some pairs and scaled to all.
"""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from cifar import coupled_resnet
from common import Cells, environment, flat, markdown, parser, read_results
from scoring_cost import seconds
from torch import Tensor, nn
from torchvision import models

from tp_importance import Budget, ITPruner
from tp_importance.allocation.curves import value_curves
from tp_importance.core.forward import call_model
from tp_importance.statistics.observe import Watch, observe

L1 = tp.importance.MagnitudeImportance(p=1)
FRACTIONS = np.linspace(0.2, 0.9, 15)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "ResNet-50": (models.resnet50, 224),
    "MobileNetV2": (models.mobilenet_v2, 224),
    "DenseNet-121": (models.densenet121, 224),
    "EfficientNet-B0": (models.efficientnet_b0, 224),
    "ResNet-110": (partial(coupled_resnet, 18), 32),
}


def keep_memory() -> bool:
    """Ask the C library not to hand memory back between passes: page faults would dominate the bare pass."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc only
    m_trim_threshold, m_mmap_max = -1, -4
    return mallopt is not None and bool(mallopt(m_mmap_max, 0) and mallopt(m_trim_threshold, -1))


def hsic(x: Tensor, y: Tensor) -> Tensor:
    centre = torch.eye(len(x)) - 1 / len(x)
    return torch.trace(x @ x.T @ centre @ (y @ y.T) @ centre)


def nhsic(x: Tensor, y: Tensor) -> Tensor:
    """As in the published code: downstream anew for every pair."""
    return hsic(x, y) / (hsic(x, x) * hsic(y, y)).sqrt()


def run(name: str, args: Any) -> dict[str, Any]:
    make, size = NETWORKS[name]
    torch.manual_seed(0)
    model = make().eval()
    batch = torch.randn(args.batch, 3, size, size)
    pruner, pooled = (ITPruner(model, batch[:1], [batch], budget=Budget(macs=0.5), pool=p) for p in (False, True))

    def forward() -> None:
        with torch.inference_mode():
            call_model(model, batch)

    work = {
        "forward": forward,
        "collect": pruner.collect,
        "pooled": pooled.collect,
        "order": partial(value_curves, L1, pruner.groups),
    }
    spent: dict[str, list[float]] = {key: [] for key in work}
    for round_ in range(args.repeats + 1):  # the first one warms up; then they take turns
        for key, f in work.items():
            start = seconds("cpu")
            f()
            if round_:
                spent[key].append(seconds("cpu") - start)
    solves, kkt = [], []
    for fraction in FRACTIONS:
        start = seconds("cpu")
        plan = pruner.plan(Budget(macs=float(fraction)))
        solves.append(seconds("cpu") - start)
        kkt.append(plan.certificate["kkt_residual"])
    collect = float(np.median(spent["collect"]))
    result = {
        "groups": len(pruner.groups),
        "forward_s": float(np.median(spent["forward"])),
        "collect_s": collect,
        "order_s": float(np.median(spent["order"])),
        **{
            key: float(np.median(np.array(spent[of]) / spent["forward"]))
            for key, of in (("ratio", "collect"), ("ratio_pooled", "pooled"))
        },
        "solve_ms": float(np.median(solves)) * 1e3,
        "worst_kkt": max(kkt),
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
        for r in g.consumers[:1]
    ]
    start = seconds("cpu")
    observe(model, [batch], watches, need_labels=False)
    forward = seconds("cpu") - start
    every = list(product(features, features))
    chosen = random.Random(0).sample(every, min(pairs, len(every)))
    start = seconds("cpu")
    for x, y in chosen:
        nhsic(x, y)
    return {"loop_s": forward + (seconds("cpu") - start) * len(every) / len(chosen), "pairs": len(chosen)}


def _keep(store: list[Tensor], channels: Tensor, x: Tensor, _out: Tensor, _labels: Tensor) -> None:
    store.append(x[:, channels].flatten(1))


def table(results: dict[str, Any]) -> str:
    columns = {
        "groups": "groups",
        "forward s": "forward_s",
        "collect s": "collect_s",
        "ratio": "ratio",
        "without L1": "ratio_without_order",
        "pool=True": "ratio_pooled",
        "new budget ms": "solve_ms",
        "worst KKT": "worst_kkt",
        "double loop s": "loop_s",
        "× ours": "loop_over_ours",
    }
    rows = []
    for cell in map(flat, results["cells"]):
        cell["ratio_without_order"] = (cell["collect_s"] - cell["order_s"]) / cell["forward_s"]
        rows.append([cell["network"], *(f"{cell[k]:.3g}" if k in cell else "" for k in columns.values())])
    return markdown(["network", *columns], rows)


def main() -> None:
    p = parser(__doc__, "itpruner_cost.json")
    p.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    p.add_argument("--batch", type=int, default=100)
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--pairs", type=int, default=100, help="pairs of the double loop that are timed, 0 for none")
    args = p.parse_args()
    if not args.table:
        torch.set_num_threads(args.threads)
        settings = {"batch": args.batch, "memory_kept": keep_memory()}
        cells = Cells(args.out, settings, environment("cpu", args.date))
        for name in args.networks:
            cells.fill({"network": name}, partial(run, name, args))
    print(table(read_results(args.out)))


if __name__ == "__main__":
    main()
