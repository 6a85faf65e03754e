"""The second game: how few training images does a pruned ResNet-20 need to recover, and how far does it come.

Every arm prunes the same pretrained network to the same MACs, looking at its draw of the training images, and has its
batch norms recalibrated on them. Then one and the same recipe for everybody: a run of its own per level, ``images``
images long, with the learning rate falling to zero. Top-1 on the first test images. One cell per run: stop and start
again at will; other recipes go into the same file.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from functools import cache, partial
from typing import Any, ClassVar

import numpy as np
import torch
from cifar import BLOCKS, Cifar10
from cifar_oneshot import CRITERIA, Make, Network
from cifar_training import train
from common import FOLLOWED, Cells, add_data_arguments, environment, flat, markdown, parser, read_results
from torch import Tensor, nn

from tp_importance import Budget, BudgetPruner, Distiller, OBSImportance


@dataclass(frozen=True)
class Arm:
    """What is pruned by.

    Attributes:
        make: the criterion.
        allocator: how it spends the budget.
        refit: whether and how the consumers are refitted.
        widths: a criterion whose widths are taken instead.
    """

    make: Make
    allocator: str
    refit: str | None = None
    widths: Make | None = None


def _obs(*_: Any) -> OBSImportance:
    return OBSImportance()


CATRO = CRITERIA["CATRO consumer"].make
RIVALS = {
    "random": Arm(CRITERIA["random"].make, "uniform"),
    "L1": Arm(CRITERIA["L1"].make, "uniform"),
    "L2": Arm(CRITERIA["L2"].make, "uniform"),
    "Taylor": Arm(CRITERIA["Taylor"].make, "greedy"),
    "CATRO": Arm(CATRO, "greedy"),
}
OURS = {
    "L1 + refit": Arm(CRITERIA["L1"].make, "uniform", "parallel"),
    "CATRO + refit": Arm(CATRO, "greedy", "parallel"),
    "CATRO + sequential refit": Arm(CATRO, "greedy", "sequential"),
    "OBS + refit": Arm(_obs, "greedy", "parallel"),
    "OBS + sequential refit": Arm(_obs, "greedy", "sequential"),
    "OBS at CATRO's widths + sequential refit": Arm(_obs, "greedy", "sequential", CATRO),
    "OBS uniform + sequential refit": Arm(_obs, "uniform", "sequential"),
}
ARMS = {**RIVALS, **OURS}
STAGES = ("layer1", "layer2", "layer3")
LEVELS = (0, 2_000, 5_000, 10_000, 25_000, 50_000, 100_000)


@dataclass(frozen=True)
class Recipe:
    """How to train, by default as recommended; ``weight`` 0 is training without a teacher.

    Attributes:
        lr: largest learning rate.
        batch_size: images per step.
        temperature: of the distillation.
        weight: the teacher's share of the loss.
        warmup: fraction of the steps in which the learning rate rises.
        freeze_bn: batch norms stay in eval mode.
        features: weight of the error in the outputs of the stages, whose widths every arm keeps.
    """

    lr: float = 0.01
    batch_size: int = 64
    temperature: float = 4.0
    weight: float = 0.9
    warmup: float = 0.0
    freeze_bn: bool = False
    features: float = 100.0

    def __str__(self) -> str:
        """Learning rate and loss, and what else is not as plain as can be."""
        loss = f"T {self.temperature:g}, w {self.weight:g}" if self.weight else "labels"
        rest = {k: getattr(self, k) for k in PLAIN}
        return ", ".join([loss, f"lr {self.lr:g}", *(f"{k} {v:g}" for k, v in rest.items() if v != PLAIN[k])])


PLAIN = {"batch_size": 128, "warmup": 0.0, "freeze_bn": False, "features": 0.0}


def pruned(net: Network, arm: Arm, seed: int, *, args: Any, data: Cifar10) -> tuple[nn.Module, dict[str, Any]]:
    """The network before any training, and what it costs."""
    model, batches = net.fresh(), data.draw(seed, args.draw_images)
    torch.manual_seed(seed)  # RandomImportance

    def pruner(make: Make, **limits: Any) -> BudgetPruner:
        return BudgetPruner(
            model,
            net.inputs,
            batches,
            importance=make(model, batches, net.layers),
            budget=Budget(macs=args.macs),
            allocator=arm.allocator,
            ignored_layers=[model.get_submodule(n) for n in net.ignored],
            verify=False,  # done once in Network
            **limits,
        )

    widths = pruner(arm.widths).plan().widths if arm.widths else None
    report = pruner(arm.make, min_widths=widths, max_widths=widths).step(refit=arm.refit)
    model.zero_grad()
    return model, {"macs": report.cost.macs, "widths": [row.after for row in report.rows]}


class Remembering(Distiller):
    """A teacher that is asked the same batch only once: a seed's batches are the same for every arm."""

    known: ClassVar[dict[int, Tensor]] = {}

    def logits(self, inputs: Any, device: torch.device | str | None = None) -> Tensor:
        key = hash(inputs.cpu().numpy().tobytes())
        if key not in self.known:
            self.known[key] = super().logits(inputs, device)
        return self.known[key]


class Runs:
    """Makes the cells of one network; what several need is done once."""

    def __init__(self, net: Network, args: Any, data: Cifar10) -> None:
        self.net, self.args, self.data = net, args, data
        self.start = cache(partial(pruned, net, args=args, data=data))

    def cell(self, arm: str, recipe: Recipe, images: int, seed: int) -> dict[str, Any]:
        """Accuracy after training on ``images`` images."""
        model, found = copy.deepcopy(self.start(ARMS[arm], seed))
        began = time.process_time()
        if images:
            options = asdict(recipe)
            features, soft = options.pop("features"), {k: options.pop(k) for k in ("temperature", "weight")}
            kind = {"device": self.args.device, "bfloat16": self.args.bfloat16}
            with ExitStack() as stack:
                if features:
                    teacher = Distiller(self.net.model, features=STAGES, feature_weight=features, **soft)
                    stack.enter_context(teacher.watching(model))
                    options["loss"] = teacher
                elif recipe.weight:
                    options["loss"] = Remembering(self.net.model, **soft)
                train(model, self.data, images, seed=seed, **kind, **options)
        seconds = time.process_time() - began
        top1 = self.data.accuracy(model, self.args.n_test, self.args.device)
        return {"top1": round(top1, 3), "cpu_s": round(seconds, 1), **found}


def table(results: dict[str, Any]) -> str:
    """Per recipe the mean ± standard deviation over seeds, and how far our best is ahead at each level.

    The last two rows compare means: with the best rival at the same level, and at the next level that has at least
    twice the images.
    """
    cells = [flat(c) for c in results["cells"]]
    parts = []
    for recipe in dict.fromkeys(c["recipe"] for c in cells if c["images"]):
        mine = [c for c in cells if c["recipe"] == recipe]
        trained = {(c["arm"], c["seed"]) for c in mine}
        mine += [c for c in cells if not c["images"] and (c["arm"], c["seed"]) in trained]
        levels = [n for n in LEVELS if any(c["images"] == n for c in mine)]
        top1 = {
            arm: [[c["top1"] for c in mine if (c["arm"], c["images"]) == (arm, n)] for n in levels]
            for arm in ARMS
            if any(c["arm"] == arm for c in mine)
        }
        rows = [[arm, *map(_spread, values)] for arm, values in top1.items()]
        ours, rivals = ([_best(top1, arms, i) for i in range(len(levels))] for arms in (OURS, RIVALS))
        later = [next((r for m, r in zip(levels, rivals, strict=True) if m and m >= 2 * n), None) for n in levels]
        rows += [
            ["ours − best rival", *map(_lead, ours, rivals)],
            ["with at most half the images", *map(_lead, ours, later)],
        ]
        parts.append(f"**{recipe}**\n\n" + markdown(["arm", *(f"{n // 1000}k" for n in levels)], rows))
    return "\n\n".join(parts)


def _best(top1: dict[str, list[list[float]]], arms: Iterable[str], level: int) -> float | None:
    return max((float(np.mean(top1[a][level])) for a in arms if a in top1 and top1[a][level]), default=None)


def _lead(ours: float | None, rival: float | None) -> str:
    return "" if ours is None or rival is None else f"{ours - rival:+.2f}"


def _spread(top1: list[float]) -> str:
    if len(top1) < 2:
        return "".join(f"{t:.2f}" for t in top1)
    return f"{np.mean(top1):.2f} ± {np.std(top1, ddof=1):.2f}"


def fill(cells: Cells, runs: Runs, args: Any) -> None:
    """The cells of one recipe, cheap levels first."""
    recipe = Recipe(**{f.name: getattr(args, f.name) for f in fields(Recipe)})
    for images in args.levels:
        for seed in args.seeds:
            for arm in args.arms:
                key = {"arm": arm, "recipe": str(recipe) if images else "", "images": images, "seed": seed}
                cells.fill(key, partial(runs.cell, arm, recipe, images, seed))


def arguments() -> argparse.ArgumentParser:
    p = parser(__doc__, "second_game.json")
    add_data_arguments(p)
    p.set_defaults(threads=1)
    p.add_argument("--network", choices=BLOCKS, default="resnet20")
    p.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    p.add_argument("--levels", type=int, nargs="+", choices=LEVELS, default=list(LEVELS), help="training images")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the draws and of the training")
    for f in fields(Recipe):
        kind: dict[str, Any] = {"action": "store_true"} if f.default is False else {"type": type(f.default)}
        p.add_argument("--" + f.name.replace("_", "-"), default=f.default, **kind)
    p.add_argument("--macs", type=float, default=0.5, help="fraction of the MACs that is kept at most")
    p.add_argument("--draw-images", type=int, default=500, help="images that the criteria see")
    p.add_argument("--n-test", type=int, default=5_000, help="test images")
    p.add_argument("--bfloat16", action="store_true", help="train under autocast: 1.7 times faster on some CPUs")
    p.add_argument("--device", default="cpu")
    return p


def opened(args: Any) -> Cells:
    """The results file for these arguments."""
    settings = {k: getattr(args, k) for k in ("network", "macs", "draw_images", "n_test", "bfloat16")}
    return Cells(args.out, settings | FOLLOWED, environment(args.device, args.date))


def main() -> None:
    args = arguments().parse_args()
    torch.set_num_threads(args.threads)
    if not args.table:
        net = Network(args.data_root, args.network, args.device)
        fill(opened(args), Runs(net, args, Cifar10.load(args.data_root, args.npz)), args)
    print(table(read_results(args.out)))


if __name__ == "__main__":
    main()
