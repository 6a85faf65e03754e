"""ITPruner on CIFAR-10 ResNets, one-shot: β, estimator, objective, and what nHSIC and the program add.

Budgets in MACs that are met, batch norms follow on the images the criterion saw, top-1 on test images. Widths come from
the program with nHSIC weights, from the program with equal weights (β = 0), from the published procedure, from one
common ratio, or from CATRO's own allocation; the channels inside from L1 or CATRO. In the pretrained networks the
channels inside the blocks go; `resnet14-conv` and `resnet8-conv`, which `run.py train` makes, have coupled stage
widths, too. Statistics are collected once per draw and serve all cells.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, lru_cache, partial
from itertools import product
from typing import Any

import numpy as np
import torch_pruning as tp

from benchmarks.experiment import FOLLOWED, Experiment, Run
from benchmarks.networks import TRAINED
from benchmarks.tables import Rows, chosen, distinct, markdown, pivot
from benchmarks.tasks import Task
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
    "L1": partial(tp.importance.MagnitudeImportance, p=1, normalizer=None),
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


def keys(run: Run) -> Iterator[dict[str, Any]]:
    for network, n_test, draw in product(*map(run.axis, ("network", "n_test", "draw"))):
        whole = {"network": network, "n_test": n_test, "draw": draw}
        yield {**whole, "arm": "dense"}
        for budget, inside in product(run.axis("budget"), run.axis("arm")):
            for case in cases(network, inside, run.axis("beta"), run.axis("width")):
                yield {**whole, "budget": budget, "arm": inside, **case}


class Draw:
    """The images of one draw, and the statistics they gave."""

    def __init__(self, run: Run, task: Task, seed: int) -> None:
        self.task, self.batches = task, task.draw(seed, run.images)
        self.cost, self.space = CostModel.from_groups(task.groups), WidthSpace.of(task.groups.groups)
        self.statistics, self.losses = cache(self._statistics), cache(self._losses)
        self._measured: dict[str, float] = {}

    def _statistics(self, inside: str, estimator: str) -> ITPrunerImportance:
        importance = ITPrunerImportance(importance=INSIDE[inside](), estimator=estimator)  # type: ignore[arg-type]
        return importance.collect(self.task.model, self.task.inputs, self.batches, groups=self.task.groups)

    def _losses(self, inside: str) -> dict[str, Curve]:
        """Curves of the importance on its own."""
        importance = INSIDE[inside]()
        return importance.collect(self.task.model, self.task.inputs, self.batches, groups=self.task.groups).curves()

    def widths(self, key: dict[str, Any]) -> tuple[dict[str, list[int]], dict[str, Any]]:
        """Units to remove per group, and what is to be recorded of the way there."""
        inside, way = key["arm"], key["widths"]
        importance = self.statistics(inside, key["estimator"] or ESTIMATORS[0])
        limits = Budget(macs=key["budget"]).limits(self.cost.dense)
        allocate: Any = None
        if way in PROGRAMS:
            objective, *per = way.split(" per ")
            importance = importance.reweighted(beta=key["beta"], objective=objective, per=per[0] if per else "layer")
            allocate = importance.program()
        elif way == "official":
            allocate = partial(self._official, importance.relevance, key["beta"])
        else:
            allocate = find_allocator(way)
        curves = self.losses(inside) if way == "greedy" else importance.curves()
        units = allocate(curves, self.cost, self.space, limits)
        removed = {n: curves[n].removed(int(u)) for n, u in zip(self.cost.names, units, strict=True)}
        kkt = getattr(allocate, "certificate", {}).get("kkt_residual")
        return removed, {"kkt": kkt, "widths_found": list(self.cost.widths(units).values())}

    def _official(
        self, shared: dict[str, float], beta: float, curves: Curves, cost: CostModel, space: WidthSpace, limits: Limits
    ) -> Ints:
        """Fractions by the published procedure, at the largest of its budgets with which ours is met."""
        official = resnet_cifar(int(self.task.name.removeprefix("resnet")))
        alpha = official_importances(list(shared.values()), beta)
        low, high = 0.0, sum(map(np.sum, official.form()))
        for _ in range(30):
            middle = (low + high) / 2
            units = np.maximum(official_fractions(official, alpha, middle) * cost.full, space.floor)
            fits = cost.evaluate(np.floor(units))[0] <= limits["macs"]
            low, high = (middle, high) if fits else (low, middle)
        target = official_fractions(official, alpha, low) * cost.full
        return fill_up(curves, cost, space, limits, target)

    def top1(self, removed: dict[str, list[int]], n_test: int) -> dict[str, Any]:
        """Prune a fresh copy, recalibrate, test; widths that were measured before are not measured again."""
        key = repr((sorted(removed.items()), n_test))
        model, groups = self.task.copy()
        remove_units(groups, removed)
        macs, params = count_ops(model, self.task.inputs)
        if key not in self._measured:
            if removed:
                recalibrate_batchnorm(model, self.batches, reference=self.task.model)
            self._measured[key] = round(self.task.top1(model, n_test), 3)
        return {"top1": self._measured[key], "macs": macs, "params": params}


drawn = lru_cache(maxsize=1)(Draw)


def cell(run: Run, key: dict[str, Any]) -> dict[str, Any]:
    draw = drawn(run, run.task(key["network"]), key["draw"])
    if key["arm"] == "dense":
        shared = {e: draw.statistics("L1", e).relevance for e in ESTIMATORS}
        relevance = {e: [round(t, 5) for t in found.values()] for e, found in shared.items()}
        return {**draw.top1({}, key["n_test"]), "groups": draw.task.groups.widths, "relevance": relevance}
    removed, notes = draw.widths(key)
    return {**draw.top1(removed, key["n_test"]), **notes}


def by_network(rows: Rows) -> str:
    """What was measured on most draws, one column per budget; β ≠ 0 only with several draws."""
    pruned = [r for r in rows if r["arm"] != "dense"]
    columns = sorted({r["budget"] for r in pruned}, reverse=True)
    header = ["inside", "widths", "estimator", "β", *(f"{b:g} MACs" for b in columns)]
    down = ("arm", "widths", "estimator", "beta")
    parts = []
    for network in sorted({r["network"] for r in rows}):
        mine, whole = chosen(pruned, network=network), chosen(rows, network=network, arm="dense")[0]
        several = [
            key
            for key in sorted(distinct(mine, *down), key=lambda k: (*map(str, k[:3]), k[3] or 0.0))
            if not key[3]
            or key[1] == "official"
            or any(len(chosen(mine, **dict(zip(down, key, strict=True)), budget=b)) > 1 for b in columns)
        ]
        title = f"{network}, dense {whole['top1']:.2f}, first {whole['n_test']} test images"
        shown = [r for r in mine if tuple(r[f] for f in down) in several]
        parts.append(
            f"{title}\n\n{pivot(shown, down, 'budget', columns=columns, header=header, order=several, label=_label)}"
        )
    return "\n\n".join(parts)


def _label(key: tuple[Any, ...]) -> list[str]:
    inside, widths, estimator, beta = key
    return [inside, widths, estimator if beta else "", "" if beta is None else f"{beta:g}"]


def by_beta(rows: Rows, budget: float) -> str:
    """One column per β, on draw 0; equal weights have no estimator."""
    mine = [r for r in chosen(rows, draw=0, budget=budget) if r["widths"] in PROGRAMS]
    betas = sorted({r["beta"] for r in mine})
    lines = []
    for network, arm, widths, estimator in sorted(distinct(mine, "network", "arm", "widths", "estimator")):
        same = chosen(mine, network=network, arm=arm, widths=widths)
        found = {r["beta"]: f"{r['top1']:.1f}" for r in same if r["estimator"] == estimator or not r["beta"]}
        if len(found) > 1:
            lines.append([network, arm, widths, estimator, *(found.get(b, "") for b in betas)])
    return markdown(["network", "inside", "widths", "estimator", *(f"β = {b:g}" for b in betas)], lines)


EXPERIMENTS = (
    Experiment(
        "itpruner",
        "ITPruner's widths on CIFAR-10",
        {
            "network": ["resnet20", "resnet56", "resnet14-conv"],
            "n_test": [10_000],
            "draw": [0],  # finalists: 0 1 2
            "budget": [0.7, 0.5, 0.3],
            "arm": list(INSIDE),
            "width": [*PROGRAMS, "official", "uniform", "greedy"],
            "beta": [-100.0, -10.0, -1.0, 0.0, 1.0, 10.0, 100.0],
        },
        cell,
        settings={"images": 500, **FOLLOWED},
        show={"by-network": by_network, **{f"beta-{100 * b:.0f}": partial(by_beta, budget=b) for b in (0.7, 0.5, 0.3)}},
        keys=keys,
        smoke={"n_test": [200], "width": ["gp", "uniform", "greedy"], "beta": [-10.0, 0.0]},
    ),
)
