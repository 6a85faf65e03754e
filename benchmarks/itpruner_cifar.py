"""ITPruner on pretrained CIFAR-10 ResNets, one-shot: β, estimator, objective, and what nHSIC and the program add.

As `cifar_oneshot.py`: block-internal channels, budgets in MACs that are met, batch norm recalibrated on the images the
criterion saw, top-1 on the test images. Widths come from the program with nHSIC weights, from the program with equal
weights (β = 0), from one common ratio, or from CATRO's own allocation; the channels inside from L1 or CATRO.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from cifar import BLOCKS, Cifar10
from cifar_oneshot import Network
from common import Cells, add_data_arguments, environment, flat, markdown, parser, read_results

from tp_importance import Budget, CATROImportance, ITPruner, recalibrate_batchnorm

INSIDE = {
    "L1": lambda: tp.importance.MagnitudeImportance(p=1, normalizer=None),
    "CATRO": CATROImportance,
}
OTHERS = ("uniform", "greedy")
"""Widths without the program: one common ratio, and (CATRO only) by the loss curves of the importance itself."""


def cases(betas: list[float], estimators: list[str], objectives: list[str]) -> Iterator[dict[str, Any]]:
    """Ways to find the widths."""
    for inside in INSIDE:
        for objective in objectives:
            for beta in betas:
                for estimator in estimators if beta else estimators[:1]:
                    yield {"widths": objective, "beta": beta, "estimator": estimator, "inside": inside}
        for other in OTHERS if inside == "CATRO" else OTHERS[:1]:
            yield {"widths": other, "beta": None, "estimator": None, "inside": inside}


def run(net: Network, case: dict[str, Any], macs: float, draw: int, args: Any, data: Cifar10) -> dict[str, Any]:
    """One cell of the table."""
    model, batches = net.fresh(), data.draw(draw, args.images)
    batches = [(x.to(args.device), y.to(args.device)) for x, y in batches]
    options: dict[str, Any] = {"allocator": case["widths"]}
    if case["widths"] not in OTHERS:
        options = {"objective": case["widths"], "beta": case["beta"], "estimator": case["estimator"]}
    pruner = ITPruner(
        model,
        net.inputs,
        batches,
        budget=Budget(macs=macs),
        importance=INSIDE[case["inside"]](),
        ignored_layers=[model.get_submodule(n) for n in net.ignored],
        verify=False,  # done once in Network
        **options,
    )
    if case["widths"] == "greedy":  # on CATRO's curves, not on those of the program
        pruner.importance = pruner.importance.importance
    plan = pruner.plan()
    shared = getattr(pruner.importance, "relevance", {})
    report = pruner.step()
    recalibrate_batchnorm(model, batches)
    return {
        "top1": round(data.accuracy(model, args.n_test, args.device), 3),
        "macs": report.cost.macs,
        "params": report.cost.params,
        "kkt": plan.certificate.get("kkt_residual"),
        "relevance": [round(t, 5) for t in shared.values()],
        "widths_found": [row.after for row in report.rows],
    }


def table(results: dict[str, Any]) -> str:
    """Mean ± standard deviation over draws; one column per fraction of the MACs."""
    cells = [flat(cell) for cell in results["cells"]]
    columns = sorted({c["kept"] for c in cells}, reverse=True)
    rows: dict[tuple[Any, ...], dict[float, list[float]]] = {}
    for c in cells:
        key = tuple(c[k] for k in ("network", "inside", "widths", "estimator", "beta"))
        rows.setdefault(key, {}).setdefault(c["kept"], []).append(c["top1"])
    lines = []
    for key, found in sorted(rows.items(), key=lambda item: (*map(str, item[0][:4]), item[0][4] or 0.0)):
        beta, estimator = key[4], key[3]
        label = [key[0], key[1], key[2], "" if not beta else estimator, "" if beta is None else f"{beta:g}"]
        lines.append([*label, *(_mean(found.get(k, [])) for k in columns)])
    return markdown(["network", "inside", "widths", "estimator", "β", *(f"{k:g} MACs" for k in columns)], lines)


def _mean(top1: list[float]) -> str:
    if not top1:
        return ""
    return f"{np.mean(top1):.2f}" + (f" ± {np.std(top1, ddof=1):.2f}" if len(top1) > 1 else "")


def main() -> None:
    p = parser(__doc__, "itpruner_cifar.json")
    add_data_arguments(p)
    p.add_argument("--networks", nargs="+", choices=BLOCKS, default=["resnet20", "resnet56"])
    p.add_argument("--macs", type=float, nargs="+", default=[0.7, 0.5, 0.3], help="fractions of the MACs that are kept")
    p.add_argument("--betas", type=float, nargs="+", default=[-10.0, -1.0, 0.0, 1.0, 10.0, 100.0])
    p.add_argument("--estimators", nargs="+", default=["biased", "unbiased"])
    p.add_argument("--objectives", nargs="+", default=["gp", "linear"])
    p.add_argument("--inside", nargs="+", choices=INSIDE, default=list(INSIDE))
    p.add_argument("--draws", type=int, nargs="+", default=[0], help="seeds of the images; finalists: 0 1 2")
    p.add_argument("--images", type=int, default=500, help="images per draw")
    p.add_argument("--n-test", type=int, default=10_000)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = p.parse_args()
    if not args.table:
        torch.set_num_threads(args.threads)
        settings = {"images": args.images, "n_test": args.n_test}
        cells = Cells(args.out, settings, environment(args.device, args.date))
        data = Cifar10.load(args.data_root, args.npz)
        for name in args.networks:
            net = Network(args.data_root, name, args.device)
            for macs in args.macs:
                for case in cases(args.betas, args.estimators, args.objectives):
                    if case["inside"] not in args.inside:
                        continue
                    for draw in args.draws:
                        key = {"network": name, **case, "kept": macs, "draw": draw}
                        cells.fill(key, partial(run, net, case, macs, draw, args, data))
    print(table(read_results(args.out)))


if __name__ == "__main__":
    main()
