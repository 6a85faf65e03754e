"""Prune a pretrained CIFAR-10 ResNet, then fine-tune it shortly with its dense self as teacher, in a plain loop.

    python examples/finetune.py --data-root ../shared/data --images 5000

The recipe: keep a `Distiller` of the dense network, prune and refit on a few hundred images, then SGD with a small
learning rate that falls to zero on whatever images there are. The student also learns the outputs of the stages, whose
widths pruning kept. The teacher alone needs no labels (`--no-labels`).
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from pathlib import Path

import torch

from tp_importance import Budget, CATROPruner, Distiller

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the package benchmarks
from benchmarks.data import Cifar10, augmented
from benchmarks.networks import PRETRAINED, cifar_resnet

STAGES = ["layer1", "layer2", "layer3"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("TP_IMPORTANCE_DATA", "../shared/data")
    parser.add_argument("--data-root", type=Path, default=Path(default))
    parser.add_argument("--network", choices=PRETRAINED, default="resnet20")
    parser.add_argument("--macs", type=float, default=0.5, help="fraction of the MACs to keep")
    parser.add_argument("--images", type=int, default=5_000, help="training images to fine-tune on")
    parser.add_argument("--lr", type=float, default=0.01, help="largest learning rate")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--no-labels", action="store_true", help="learn from the teacher alone")
    parser.add_argument("--n-test", type=int, default=5_000, help="test images")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    data = Cifar10.load(args.data_root)
    calibration = data.draw(args.seed, 500)
    model = cifar_resnet(args.data_root, args.network)
    print(f"dense {data.accuracy(model, args.n_test):.2f} %", flush=True)

    distiller = Distiller(model, features=STAGES)  # before pruning: it keeps a copy
    pruner = CATROPruner(model, torch.randn(2, 3, 32, 32), calibration, budget=Budget(macs=args.macs))
    pruner.step(refit="sequential")
    print(f"pruned {data.accuracy(model, args.n_test):.2f} %", flush=True)

    start = time.perf_counter()
    steps = math.ceil(args.images / args.batch_size)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=5e-4)  # after pruning
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    with distiller.watching(model):
        for x, y in augmented(data, args.images, args.seed, batch_size=args.batch_size):
            optimizer.zero_grad()
            distiller(model(x), x, None if args.no_labels else y).backward()
            optimizer.step()
            schedule.step()
    print(
        f"fine-tuned on {args.images} images {data.accuracy(model, args.n_test):.2f} %, "
        f"{time.perf_counter() - start:.0f} s"
    )


if __name__ == "__main__":
    main()
