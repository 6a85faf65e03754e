"""ITPruner on CIFAR-10 ResNets, one-shot: β, estimator, objective, and what nHSIC and the program add.

As `cifar_oneshot.py`: budgets in MACs that are met, batch norm recalibrated on the images the criterion saw, top-1 on
test images. Widths come from the program with nHSIC weights, from the program with equal weights (β = 0), from the
published procedure, from one common ratio, or from CATRO's own allocation; the channels inside from L1 or CATRO.
In the pretrained networks the channels inside the blocks go; `resnet14-conv` and `resnet8-conv`, which
`cifar_train.py` trains, have coupled stage widths, too. Statistics are collected once per draw and serve all cells.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from cifar import NETWORKS, TRAINED, Batches, Cifar10
from cifar_oneshot import Network
from common import FOLLOWED, Cells, add_data_arguments, environment, flat, markdown, parser, read_results

from tp_importance import Budget, CATROImportance, ITPrunerImportance, count_ops, recalibrate_batchnorm
from tp_importance.allocation.curves import Curve, Curves
from tp_importance.allocation.limits import Limits
from tp_importance.allocation.registry import find_allocator
from tp_importance.allocation.space import WidthSpace
from tp_importance.allocation.walk import fill_up
from tp_importance.core.types import Ints
from tp_importance.graph.cost import CostModel
from tp_importance.graph.surgery import remove_units
from tp_importance.methods.itpruner.official import official_fractions, official_importances
from tp_importance.methods.itpruner.official_networks import resnet_cifar

INSIDE: dict[str, Any] = {
    "L1": lambda: tp.importance.MagnitudeImportance(p=1, normalizer=None),
    "CATRO": CATROImportance,
}
PROGRAMS = ("gp", "linear", "gp per group", "linear per group")
"""The last two are for networks with coupled widths: elsewhere every group is made by one layer."""
PUBLISHED_BETA = {"resnet20": 246.0, "resnet56": 500.0}
ESTIMATORS = ("biased", "unbiased")


def cases(net: str, inside: str, betas: list[float], widths: list[str]) -> Iterator[dict[str, Any]]:
    """Ways to find the widths."""
    published = [PUBLISHED_BETA[net]] if net in PUBLISHED_BETA and inside == "L1" and "official" in widths else []
    for way in widths:
        if way in PROGRAMS and (net in TRAINED or "group" not in way):
            for beta in sorted({*betas, *published}):
                for estimator in ESTIMATORS if beta else ESTIMATORS[:1]:
                    yield {"widths": way, "beta": beta, "estimator": estimator}
        elif way == "official":
            yield from ({"widths": way, "beta": beta, "estimator": ESTIMATORS[0]} for beta in published)
        elif way == "uniform" or (way == "greedy" and inside == "CATRO"):  # L1 does not compare across groups
            yield {"widths": way, "beta": None, "estimator": None}


class Draw:
    """The images of one draw, and the statistics they gave."""

    def __init__(self, net: Network, batches: Batches) -> None:
        self.net, self.batches = net, batches
        self.cost, self.space = CostModel.from_groups(net.groups), WidthSpace.of(net.groups.groups)
        self.statistics, self.losses = cache(self._statistics), cache(self._losses)
        self._measured: dict[str, float] = {}

    def _statistics(self, inside: str, estimator: str) -> ITPrunerImportance:
        importance = ITPrunerImportance(importance=INSIDE[inside](), estimator=estimator)  # type: ignore[arg-type]
        return importance.collect(self.net.model, self.net.inputs, self.batches, groups=self.net.groups)

    def _losses(self, inside: str) -> dict[str, Curve]:
        """Curves of the importance on its own."""
        return INSIDE[inside]().collect(self.net.model, self.net.inputs, self.batches, groups=self.net.groups).curves()

    def widths(self, inside: str, case: dict[str, Any], macs: float) -> tuple[dict[str, list[int]], dict[str, Any]]:
        """Units to remove per group, and what is to be recorded of the way there."""
        importance = self.statistics(inside, case["estimator"] or ESTIMATORS[0])
        limits = Budget(macs=macs).limits(self.cost.dense)
        allocate: Any = None
        if case["widths"] in PROGRAMS:
            objective, *per = case["widths"].split(" per ")
            importance = importance.reweighted(beta=case["beta"], objective=objective, per=per[0] if per else "layer")
            allocate = importance.allocator()
        elif case["widths"] == "official":
            allocate = partial(self._official, importance.relevance, case["beta"])
        else:
            allocate = find_allocator(case["widths"])
        curves = self.losses(inside) if case["widths"] == "greedy" else importance.curves()
        units = allocate(curves, self.cost, self.space, limits)
        removed = {n: curves[n].removed(int(u)) for n, u in zip(self.cost.names, units, strict=True)}
        kkt = getattr(allocate, "certificate", {}).get("kkt_residual")
        return removed, {"kkt": kkt, "widths_found": list(self.cost.widths(units).values())}

    def _official(
        self, shared: dict[str, float], beta: float, curves: Curves, cost: CostModel, space: WidthSpace, limits: Limits
    ) -> Ints:
        """Fractions by the published procedure, at the largest of its budgets with which ours is met."""
        official = resnet_cifar(int(self.net.name.removeprefix("resnet")))
        alpha = official_importances(list(shared.values()), beta)
        low, high = 0.0, sum(map(np.sum, official.form()))
        for _ in range(30):
            middle = (low + high) / 2
            units = np.maximum(official_fractions(official, alpha, middle) * cost.full, space.floor)
            fits = cost.evaluate(np.floor(units))[0] <= limits["macs"]
            low, high = (middle, high) if fits else (low, middle)
        target = official_fractions(official, alpha, low) * cost.full
        return fill_up(curves, cost, space, limits, target)

    def top1(self, removed: dict[str, list[int]], data: Cifar10, n_test: int) -> dict[str, Any]:
        """Prune a fresh copy, recalibrate, test; widths that were measured before are not measured again."""
        key = repr((sorted(removed.items()), n_test))
        model, groups = self.net.copy()
        remove_units(groups, removed)
        macs, params = count_ops(model, self.net.inputs)
        if key not in self._measured:
            if removed:
                recalibrate_batchnorm(model, self.batches, reference=self.net.model)
            self._measured[key] = round(data.accuracy(model, n_test, self.net.device, batch_size=100), 3)
        return {"top1": self._measured[key], "macs": macs, "params": params}


def run(draw: Draw, inside: str, case: dict[str, Any], macs: float, data: Cifar10, n_test: int) -> dict[str, Any]:
    """One cell of the table."""
    removed, notes = draw.widths(inside, case, macs)
    return {**draw.top1(removed, data, n_test), **notes}


def dense(draw: Draw, data: Cifar10, n_test: int) -> dict[str, Any]:
    shared = {e: draw.statistics("L1", e).relevance for e in ESTIMATORS}
    return {
        **draw.top1({}, data, n_test),
        "groups": draw.net.groups.widths,
        "relevance": {e: [round(t, 5) for t in found.values()] for e, found in shared.items()},
    }


def table(results: dict[str, Any]) -> str:
    """What was measured on most draws, per network; then the sweep over β on draw 0, per fraction of the MACs."""
    cells = [flat(cell) for cell in results["cells"]]
    pruned = [c for c in cells if c["kept"] is not None]
    columns = sorted({c["kept"] for c in pruned}, reverse=True)
    parts = []
    for network in sorted({c["network"] for c in cells}):
        mine = [c for c in pruned if c["network"] == network]
        whole = next(c for c in cells if c["network"] == network and c["kept"] is None)
        title = f"{network}, dense {whole['top1']:.2f}, first {whole['n_test']} test images"
        parts.append(f"{title}\n\n{_finalists(mine, columns)}")
    for kept in columns:
        parts.append(f"β on draw 0, {kept:g} of the MACs\n\n{_sweep([c for c in pruned if c['kept'] == kept])}")
    return "\n\n".join(parts)


def _finalists(cells: list[dict[str, Any]], columns: list[float]) -> str:
    """Mean ± standard deviation over draws, one column per fraction of the MACs; β ≠ 0 only with several draws."""
    rows: dict[tuple[Any, ...], dict[float, list[float]]] = {}
    for c in cells:
        key = tuple(c[k] for k in ("inside", "widths", "estimator", "beta"))
        rows.setdefault(key, {}).setdefault(c["kept"], []).append(c["top1"])
    lines = []
    for key, found in sorted(rows.items(), key=lambda item: (*map(str, item[0][:3]), item[0][3] or 0.0)):
        inside, widths, estimator, beta = key
        if beta and widths != "official" and max(map(len, found.values())) == 1:
            continue
        label = [inside, widths, estimator if beta else "", "" if beta is None else f"{beta:g}"]
        lines.append([*label, *(_mean(found.get(k, [])) for k in columns)])
    return markdown(["inside", "widths", "estimator", "β", *(f"{k:g} MACs" for k in columns)], lines)


def _sweep(cells: list[dict[str, Any]]) -> str:
    """One column per β; equal weights have no estimator."""
    chosen = [c for c in cells if c["draw"] == 0 and c["widths"] in PROGRAMS]
    betas = sorted({c["beta"] for c in chosen})
    rows = sorted({(c["network"], c["inside"], c["widths"], c["estimator"]) for c in chosen})
    lines = []
    for row in rows:
        found = {c["beta"]: c["top1"] for c in chosen if (c["network"], c["inside"], c["widths"]) == row[:3]
                 and (c["estimator"] == row[3] or not c["beta"])}  # fmt: skip
        if len(found) > 1:
            lines.append([*row, *(_mean([found[b]] if b in found else []) for b in betas)])
    return markdown(["network", "inside", "widths", "estimator", *(f"β = {b:g}" for b in betas)], lines)


def _mean(top1: list[float]) -> str:
    if not top1:
        return ""
    return f"{np.mean(top1):.1f}" + (f" ± {np.std(top1, ddof=1):.1f}" if len(top1) > 1 else "")


def main() -> None:
    p = parser(__doc__, "itpruner_cifar.json")
    add_data_arguments(p)
    p.add_argument("--networks", nargs="+", choices=NETWORKS, default=["resnet20", "resnet56", "resnet14-conv"])
    p.add_argument("--macs", type=float, nargs="+", default=[0.7, 0.5, 0.3], help="fractions of the MACs that are kept")
    p.add_argument("--betas", type=float, nargs="+", default=[-100.0, -10.0, -1.0, 0.0, 1.0, 10.0, 100.0])
    p.add_argument(
        "--widths",
        nargs="+",
        default=[*PROGRAMS, "official", "uniform", "greedy"],
        help="ways to find the widths, greedy for CATRO only",
    )
    p.add_argument("--inside", nargs="+", choices=INSIDE, default=list(INSIDE))
    p.add_argument("--draws", type=int, nargs="+", default=[0], help="seeds of the images; finalists: 0 1 2")
    p.add_argument("--images", type=int, default=500, help="images per draw")
    p.add_argument("--n-test", type=int, default=10_000, help="the first test images; part of a cell's key")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = p.parse_args()
    if not args.table:
        torch.set_num_threads(args.threads)
        cells = Cells(args.out, {"images": args.images} | FOLLOWED, environment(args.device, args.date))
        data = Cifar10.load(args.data_root, args.npz)
        for name in args.networks:
            net = Network(args.data_root, name, args.device)
            for seed in args.draws:
                batches = [(x.to(args.device), y.to(args.device)) for x, y in data.draw(seed, args.images)]
                draw = Draw(net, batches)
                whole = {"network": name, "n_test": args.n_test, "draw": seed, "kept": None}
                cells.fill(whole, partial(dense, draw, data, args.n_test))
                for macs in args.macs:
                    for inside in args.inside:
                        for case in cases(name, inside, args.betas, args.widths):
                            key = {**whole, "kept": macs, "inside": inside, **case}
                            cells.fill(key, partial(run, draw, inside, case, macs, data, args.n_test))
    print(table(read_results(args.out)))


if __name__ == "__main__":
    main()
