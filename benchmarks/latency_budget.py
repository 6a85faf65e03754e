"""Does a network that was pruned to a predicted latency have it? Random weights; time does not depend on them.

Per network and batch the layer table is measured once and the model calibrated on the network and three uniformly
narrowed copies; then copies are pruned by L2 norm to fractions of the measured latency, and measured. Run it on a quiet
machine.
"""

from __future__ import annotations

import time
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from common import Cells, environment, flat, markdown, parser, read_results
from torch import nn
from torchvision import models

from tp_importance import Budget, BudgetPruner, LatencyTable

NETWORKS = {"resnet50": models.resnet50, "mobilenet_v2": models.mobilenet_v2}
ALLOCATORS = ("greedy", "uniform")
BUDGETS = (0.8, 0.6, 0.4)


def build(name: str, batch: int, device: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return NETWORKS[name]().eval().to(device), torch.randn(batch, 3, 224, 224, device=device)


def pruner(model: nn.Module, x: torch.Tensor, table: LatencyTable, allocator: str) -> BudgetPruner:
    options: dict[str, Any] = {"budget": Budget(latency=0.5), "allocator": allocator, "latency_table": table}
    importance = tp.importance.MagnitudeImportance(p=2)
    return BudgetPruner(model, x, importance=importance, verify=False, **options)  # bench-zoo has verified them


class Case:
    """One network, batch and allocator: measured with the first cell that needs it, then planned for every budget."""

    def __init__(self, name: str, batch: int, allocator: str, table: LatencyTable, device: str) -> None:
        self.args = (name, batch, device)
        self.allocator, self.table = allocator, table
        self._planner: BudgetPruner | None = None
        self.seconds = 0.0

    def cell(self, fraction: float) -> dict[str, Any]:
        if self._planner is None:
            self._planner = pruner(*build(*self.args), self.table, self.allocator)
            start = time.perf_counter()
            self._planner.measure_latency()
            self.seconds = time.perf_counter() - start
        start = time.perf_counter()
        plan = self._planner.plan(Budget(latency=fraction))
        planned = time.perf_counter() - start
        report = pruner(*build(*self.args), self.table, self.allocator).apply(plan)
        ms = {key: round(value, 4) for key, value in report.latency_ms.to_dict().items()}
        return {
            **ms,
            "error": round(ms["predicted"] / ms["measured"] - 1, 4),
            "macs": round(report.cost.macs / report.dense.macs, 4),
            "plan_s": round(planned, 2),
            "model_s": round(self.seconds, 1),
            "calibration": self._planner.measure_latency().calibration,
        }


def table(results: dict[str, Any]) -> str:
    rows = []
    for cell in map(flat, results["cells"]):
        rows.append(
            [
                cell["network"],
                cell["batch"],
                cell["allocator"],
                cell["latency"],
                f"{cell['dense']:.2f} ± {cell['dense_iqr']:.2f}",
                f"{cell['predicted']:.2f}",
                f"{cell['measured']:.2f} ± {cell['measured_iqr']:.2f}",
                f"{100 * cell['error']:+.1f} %",
                f"{cell['macs']:.3f}",
            ]
        )
    header = ["network", "batch", "allocator", "budget", "dense ms", "predicted ms", "measured ms", "error"]
    return markdown([*header, "MACs kept"], rows)


def main() -> None:
    p = parser(__doc__, "latency_budget.json")
    p.set_defaults(threads=1)
    p.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    p.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    p.add_argument("--device", default="cpu")
    p.add_argument("--layers", type=Path, help="file to keep the layer times in; default: measured anew")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    if not args.table:
        cells = Cells(args.out, {"device": args.device}, environment(args.device, args.date))
        layers = LatencyTable(args.layers)
        for name, batch, allocator in product(args.networks, args.batches, ALLOCATORS):
            case = Case(name, batch, allocator, layers, args.device)
            for fraction in BUDGETS:
                key = {"network": name, "batch": batch, "allocator": allocator, "latency": fraction}
                cells.fill(key, partial(case.cell, fraction))
    print(table(read_results(args.out)))


if __name__ == "__main__":
    main()
