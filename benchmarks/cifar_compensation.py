"""One-shot pruning of pretrained CIFAR-10 ResNets with compensated surgery: what a refit is worth to every criterion.

Every cell: channels inside the blocks, a budget in MACs that is met exactly, 500 training images of a draw for scores,
refit and batch norms, no training, top-1 on the first 5,000 test images. Without a sequential refit batch norms
follow the change. Run again, it goes on where it stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from cifar import BLOCKS, Batches, Cifar10
from cifar_oneshot import CRITERIA, Network
from common import FOLLOWED, Cells, add_data_arguments, environment, flat, markdown, parser, read_results
from host_criteria import accumulate_gradients
from torch import nn

from tp_importance import (
    Budget,
    BudgetPruner,
    CATROImportance,
    ITPruner,
    OBSImportance,
    PSAPImportance,
    Refit,
    count_ops,
)
from tp_importance.pruning.registry import METHODS
from tp_importance.statistics.consumers import ConsumerStatistics

Make = Callable[..., BudgetPruner]
MODES = ("none", "parallel", "sequential")


def _host(criterion: str, allocator: str) -> Make:
    def make(model: nn.Module, inputs: Any, batches: Batches, layers: list[str], **options: Any) -> BudgetPruner:
        importance = CRITERIA[criterion].make(model, batches, layers)
        return BudgetPruner(model, inputs, batches, importance=importance, allocator=allocator, **options)

    return make


def _ours(importance: Callable[[], Any], allocator: str = "greedy") -> Make:
    def make(model: nn.Module, inputs: Any, batches: Batches, layers: list[str], **options: Any) -> BudgetPruner:
        return BudgetPruner(model, inputs, batches, importance=importance(), allocator=allocator, **options)

    return make


def _named(method: str, allocator: str) -> Make:
    """What `prune(method=...)` takes, scores as their host normalises them."""

    def make(model: nn.Module, inputs: Any, batches: Batches, layers: list[str], **options: Any) -> BudgetPruner:
        found = METHODS[method]
        if found.needs_gradients:
            accumulate_gradients(model, batches)
        assert found.make is not None
        return BudgetPruner(model, inputs, batches, importance=found.make(), allocator=allocator, **options)

    return make


def _itpruner(model: nn.Module, inputs: Any, batches: Batches, layers: list[str], **options: Any) -> BudgetPruner:
    return ITPruner(model, inputs, batches, **options)


ARMS: dict[str, Make] = {  # every criterion under the widths that suit it better, see docs/benchmarks.md
    "random, uniform": _host("random", "uniform"),
    "L1, uniform": _host("L1", "uniform"),
    "L2, uniform": _host("L2", "uniform"),
    "FPGM, uniform": _host("FPGM", "uniform"),
    "BN scale, uniform": _host("BN scale", "uniform"),
    "Taylor, uniform": _host("Taylor", "uniform"),
    "Taylor, greedy": _host("Taylor", "greedy"),
    "Taylor multivariable, greedy": _host("Taylor, multivariable", "greedy"),
    "NNI L1, uniform": _host("NNI L1", "uniform"),
    "NNI FPGM, uniform": _host("NNI FPGM", "uniform"),
    "NNI Taylor, greedy": _host("NNI Taylor", "greedy"),
    "PSAP, greedy": _ours(PSAPImportance),
    "ITPruner": _itpruner,
    "CATRO channel, greedy": _ours(lambda: CATROImportance(space="channel")),
    "CATRO consumer, greedy": _ours(CATROImportance),
    "OBS, uniform": _ours(OBSImportance, "uniform"),
    "OBS, greedy": _ours(OBSImportance),
    "OBS by outputs, greedy": _ours(OBSImportance),
    **{
        f'method "{name}", {allocator}': _named(name, allocator)
        for name in ("l1", "l2", "fpgm", "taylor", "psap")
        for allocator in ("uniform", "greedy")
    },
}
DEFAULTS = [arm for arm in ARMS if arm.startswith("method")]
"""Arms that decide which widths a method takes by default."""
SHORT = ["L2, uniform", "Taylor, greedy", "CATRO consumer, greedy", "OBS, greedy"]
"""Arms for further networks and budgets."""


@contextmanager
def by_outputs() -> Iterator[None]:
    """OBS with losses relative to energy^¾ of the consumer's own output, not to the energy of the residual sum."""

    def relative(statistics: ConsumerStatistics, name: str) -> float:
        return (statistics.energy(name) or float("inf")) ** -0.75

    without = mock.patch.object(ConsumerStatistics, "sums", lambda *_: nullcontext())
    with without, mock.patch.object(ConsumerStatistics, "relative", relative):
        yield


def run(net: Network, arm: str, mode: str, draw: int, macs: float, args: Any, data: Cifar10) -> dict[str, Any]:
    """One cell of the table."""
    model, batches = net.fresh(), data.draw(draw, args.images)
    batches = [(x.to(args.device), y.to(args.device)) for x, y in batches]
    torch.manual_seed(draw)  # RandomImportance
    start = time.perf_counter()
    pruner = ARMS[arm](
        model,
        net.inputs,
        batches,
        net.layers,
        budget=Budget(macs=macs),
        ignored_layers=[model.get_submodule(n) for n in net.ignored],
        verify=False,  # done once in Network
    )
    with by_outputs() if "by outputs" in arm else nullcontext():
        how = None if mode == "none" else Refit(mode, ridge=args.ridge)  # type: ignore[arg-type]
        report = pruner.step(refit=how)
    seconds = time.perf_counter() - start
    return {
        "top1": round(data.accuracy(model, args.n_test, args.device), 3),
        "macs": report.cost.macs,
        "params": report.cost.params,
        "pruning_s": round(seconds, 2),
        "widths": [row.after for row in report.rows],
    }


def table(results: dict[str, Any]) -> str:
    """Mean ± standard deviation over draws, per network and budget."""
    cells = [flat(c) for c in results["cells"]]
    parts = []
    for name, macs in sorted({(c["network"], c["macs_kept"]) for c in cells if c["arm"] != "dense"}):
        dense = next(c["top1"] for c in cells if c["network"] == name and c["arm"] == "dense")
        rows = []
        for arm in ARMS:
            row = [arm]
            for mode in MODES:
                key = {"network": name, "macs_kept": macs, "arm": arm, "mode": mode}
                top1 = [c["top1"] for c in cells if key.items() <= c.items()]
                spread = f" ± {np.std(top1, ddof=1):.1f}" if len(top1) > 1 else ""
                row.append(f"{np.mean(top1):.1f}{spread}" if top1 else "")
            rows += [row] if any(row[1:]) else []
        title = f"{name}, {macs:g} of the MACs (dense {dense:.1f})"
        parts.append(markdown([title, "no refit", "parallel", "sequential"], rows))
    return "\n\n".join(parts)


def main() -> None:
    p = parser(__doc__, "cifar_compensation.json")
    add_data_arguments(p)
    p.add_argument("--networks", nargs="+", choices=BLOCKS, default=["resnet20", "resnet56"])
    p.add_argument("--arms", nargs="+", choices=[*ARMS, "short", "defaults"], default=list(ARMS))
    p.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    p.add_argument("--draws", type=int, nargs="+", default=[0, 1, 2], help="seeds of the images")
    p.add_argument("--images", type=int, default=500, help="images per draw")
    p.add_argument("--macs", type=float, nargs="+", default=[0.5], help="fractions of the MACs that are kept at most")
    p.add_argument("--ridge", type=lambda s: s if s == "auto" else float(s), default="auto", help="of the refit")
    p.add_argument("--n-test", type=int, default=5_000)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = p.parse_args()
    if not args.table:
        torch.set_num_threads(args.threads)
        settings = {"images": args.images, "n_test": args.n_test}
        settings |= {} if args.ridge == "auto" else {"ridge": args.ridge}
        cells = Cells(args.out, settings | FOLLOWED, environment(args.device, args.date))
        data = Cifar10.load(args.data_root, args.npz)
        for name in args.networks:
            net = Network(args.data_root, name, args.device)
            key = {"network": name, "arm": "dense", "mode": "", "draw": 0, "macs_kept": 1.0}
            cells.fill(key, partial(_dense, net, args, data))
            for draw in args.draws:
                for macs in args.macs:
                    for arm in {"short": SHORT, "defaults": DEFAULTS}.get(args.arms[0], args.arms):
                        for mode in args.modes:
                            key = {"network": name, "arm": arm, "mode": mode, "draw": draw, "macs_kept": macs}
                            cells.fill(key, partial(run, net, arm, mode, draw, macs, args, data))
    print(table(read_results(args.out)))


def _dense(net: Network, args: Any, data: Cifar10) -> dict[str, Any]:
    macs, params = count_ops(net.model, net.inputs)
    return {"top1": round(data.accuracy(net.fresh(), args.n_test, args.device), 3), "macs": macs, "params": params}


if __name__ == "__main__":
    main()
