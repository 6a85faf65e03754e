"""Train a deep network without shortcuts, with and without fusible residual convolutions (ResConv's second claim).

    python examples/resconv_plain.py --depth 32 --seeds 0 1 2

The same plain network, the same training: once as it is, once with a shortcut around every convolution
(`convert_to_resconv(..., a=1)`). After training the shortcuts are fused away: both are plain networks of one size.
Data: scikit-learn's digits, half of them for testing. Every number is measured here.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from quickstart import accuracy, digits, train
from torch import nn

from tp_importance import convert_to_resconv, count_ops, fuse


def plain(depth: int, width: int = 16) -> nn.Sequential:
    """``depth`` convolutions, each with batch norm and ReLU, no shortcuts."""
    layers: list[nn.Module] = []
    for i in range(depth):
        layers += [nn.Conv2d(width if i else 1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def run(depth: int, s: float | None, epochs: int, lr: float, seed: int) -> tuple[float, tuple[int, int]]:
    """Test accuracy after training (and fusing), and the cost of the result."""
    training, _, test = digits(seed)
    torch.manual_seed(seed)
    model, x = plain(depth), test[0][0][:2]
    if s is not None:
        convert_to_resconv(model, x, s=s, a=1.0)
    train(model, training, epochs, lr, seed)
    if s is not None:
        before = accuracy(model, test)
        fuse(model)
        assert abs(accuracy(model, test) - before) < 0.2, "fusing changed the function"
    return accuracy(model, test), count_ops(model, x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, nargs="+", default=[8, 32], help="convolutions")
    parser.add_argument("--s", type=float, nargs="+", default=[1.0, 0.2], help="initial layer scaling factors")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("depth  network  test accuracy, %     MACs  params  s/run")
    for depth in args.depth:
        for s in (None, *args.s):
            start = time.perf_counter()
            found = [run(depth, s, args.epochs, args.lr, seed) for seed in args.seeds]
            top1, (macs, params) = [f[0] for f in found], found[0][1]
            spread = f" ± {statistics.stdev(top1):.1f}" if len(top1) > 1 else ""
            seconds = (time.perf_counter() - start) / len(found)
            name = "plain" if s is None else f"s = {s:g}"
            cells = f"{statistics.mean(top1):5.1f}{spread:14s} {macs:>8,} {params:>7,} {seconds:6.1f}"
            print(f"{depth:5d}  {name:7s}  {cells}", flush=True)


if __name__ == "__main__":
    main()
