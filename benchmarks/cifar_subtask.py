"""Pruning to a classification subtask: does class information help when only some classes matter?

Pretrained CIFAR-10 ResNets keep three of the ten classes: half of the MACs go in one shot, seen through images of these
classes, BN recalibrated on them, classifier sliced, top-1 among the three on their test images. Class-blind rivals see
all ten classes (same draw) or no data at all.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from cifar import BLOCKS, Batches, Cifar10, normalised
from cifar_oneshot import Network
from common import FOLLOWED, Cells, add_data_arguments, environment, flat, markdown, parser, read_results

from tp_importance import Budget, BudgetPruner, CATROImportance, recalibrate_batchnorm, slice_classifier

ARMS: dict[str, dict[str, Any] | None] = {
    "L2, uniform": None,
    "consumer, all ten classes": {},
    **{f"consumer, subtask, θ = {theta}": {"class_weight": theta} for theta in (0.0, 0.5, 0.7, 0.9, 1.0)},
}


def only(batches: Batches, classes: list[int]) -> Batches:
    """The samples of ``classes``, labels unchanged."""
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    keep = torch.isin(y, torch.tensor(classes, device=y.device))
    return list(zip(x[keep].split(100), y[keep].split(100), strict=True))


@torch.inference_mode()
def accuracy(model: torch.nn.Module, data: Cifar10, classes: list[int], device: str) -> float:
    """Top-1 among ``classes``, in percent; output c is class ``classes[c]``."""
    hits = total = 0
    for target, label in enumerate(classes):
        mine = normalised(data.x_test[data.y_test == label]).to(device)
        hits += int((model(mine).argmax(1) == target).sum())
        total += len(mine)
    return 100.0 * hits / total


def run(net: Network, arm: str, classes: list[int], draw: int, args: Any, data: Cifar10) -> dict[str, Any]:
    model = net.fresh()
    downstream = [(x.to(args.device), y.to(args.device)) for x, y in data.draw(draw, args.images)]
    loader = only(downstream, classes)
    options, subtask = ARMS[arm], "subtask" in arm
    importance: Any = tp.importance.MagnitudeImportance(p=2) if options is None else CATROImportance(**options)
    pruner = BudgetPruner(
        model,
        net.inputs,
        loader if subtask else downstream,
        importance=importance,
        budget=Budget(macs=args.macs),
        allocator="uniform" if options is None else "greedy",
        ignored_layers=[model.get_submodule(n) for n in net.ignored],
        verify=False,  # done once in Network
    )
    report = pruner.step()
    recalibrate_batchnorm(model, loader, reference=net.model)
    slice_classifier(model, classes)
    return {"top1": round(accuracy(model.eval(), data, classes, args.device), 3), "macs": report.cost.macs}


def table(results: dict[str, Any]) -> str:
    """Mean ± standard deviation over subtasks and draws."""
    cells = [flat(c) for c in results["cells"]]
    names = sorted({c["network"] for c in cells})
    rows = []
    for arm in dict.fromkeys(c["arm"] for c in cells):
        row = [arm]
        for name in names:
            top1 = [c["top1"] for c in cells if c["arm"] == arm and c["network"] == name]
            row.append(f"{np.mean(top1):.2f} ± {np.std(top1, ddof=1):.2f} ({len(top1)})" if len(top1) > 1 else "")
        rows.append(row)
    return markdown(["criterion", *names], rows)


def main() -> None:
    p = parser(__doc__, "cifar_subtask.json")
    add_data_arguments(p)
    p.add_argument("--networks", nargs="+", choices=BLOCKS, default=["resnet20", "resnet56"])
    p.add_argument("--draws", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--subtasks", type=int, default=5, help="random triples of classes per draw")
    p.add_argument("--images", type=int, default=500, help="images per draw, of all classes")
    p.add_argument("--macs", type=float, default=0.5)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = p.parse_args()
    if args.table:
        print(table(read_results(args.out)))
        return
    torch.set_num_threads(args.threads)
    data = Cifar10.load(args.data_root, args.npz)
    settings = {"macs": args.macs, "images": args.images, "subtasks": args.subtasks}
    cells = Cells(args.out, settings | FOLLOWED, environment(args.device, args.date))
    rng = np.random.default_rng(0)
    triples = [sorted(rng.choice(10, 3, replace=False).tolist()) for _ in range(args.subtasks)]
    for name in args.networks:
        net = Network(args.data_root, name, args.device)
        for draw in args.draws:
            for classes in triples:
                for arm in ARMS:
                    key = {"network": name, "arm": arm, "classes": classes, "draw": draw}
                    cells.fill(key, partial(run, net, arm, classes, draw, args, data))
    print(table(read_results(args.out)))


if __name__ == "__main__":
    main()
