"""Prune a pretrained CIFAR-10 ResNet to a budget in one shot, on real data.

    python examples/cifar10_resnet.py --data-root ../shared/data --network resnet20 --macs 0.5

The data folder holds CIFAR-10, the network definition and its weights (see its README); nothing is downloaded.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import torch

from tp_importance import Budget, CATROPruner, load_pruned, save_pruned

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the package benchmarks
from benchmarks.data import Cifar10
from benchmarks.networks import PRETRAINED, cifar_resnet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("TP_IMPORTANCE_DATA", "../shared/data")
    parser.add_argument("--data-root", type=Path, default=Path(default))
    parser.add_argument("--network", choices=PRETRAINED, default="resnet20")
    parser.add_argument("--macs", type=float, default=0.5, help="fraction of the MACs to keep")
    parser.add_argument("--space", choices=("consumer", "channel"), default="consumer")
    parser.add_argument("--images", type=int, default=500, help="training images the criterion sees")
    parser.add_argument("--n-test", type=int, default=10_000, help="test images")
    parser.add_argument("--seed", type=int, default=0, help="of the draw of training images")
    parser.add_argument(
        "--out", type=Path, default=Path("outputs"), help="folder for the report and the pruned network"
    )
    args = parser.parse_args()

    data = Cifar10.load(args.data_root)
    loader = data.draw(args.seed, args.images)
    model = cifar_resnet(args.data_root, args.network)
    print(f"dense: {data.accuracy(model, args.n_test):.2f} % of {args.n_test} test images", flush=True)

    start = time.perf_counter()
    pruner = CATROPruner(model, torch.randn(1, 3, 32, 32), loader, budget=Budget(macs=args.macs), space=args.space)
    report = pruner.step(refit="batchnorm")
    print(f"{report}\n\npruned in {time.perf_counter() - start:.1f} s")
    print(f"one shot, no training: {data.accuracy(model, args.n_test):.2f} %")

    args.out.mkdir(parents=True, exist_ok=True)
    report.to_json(args.out / f"{args.network}.json")
    report.plot(args.out / f"{args.network}.png")
    path = args.out / f"{args.network}-pruned.pt"
    save_pruned(model, path)
    again = load_pruned(lambda: cifar_resnet(args.data_root, args.network), path)
    x = loader[0][0]
    same = torch.equal(again(x), model.cpu()(x))
    print(f"saved to {path}, and loaded again {'bit-exactly' if same else 'WRONGLY'}")


if __name__ == "__main__":
    main()
