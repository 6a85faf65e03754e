"""Pruning while training on CIFAR-10: a pretrained ResNet down to a fifth of its MACs within two epochs.

All arms take the same number of optimizer steps with the same batches (random crops and flips, by seed) and learning
rates, and prune the channels inside the blocks. Top-1 on the test images after the last step. One cell per run: stop
and start again at will.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import numpy as np
import torch
from cifar import BLOCKS, Cifar10, normalised
from cifar_oneshot import Network
from common import Cells, add_data_arguments, environment, flat, markdown, parser, read_results
from prune_training import ARMS, HOSTS, PSAP, Training, prune
from torch import Tensor
from torch.nn import functional as F

from tp_importance import count_ops

FIVE = (*PSAP, HOSTS[0])


class Batches:
    """Augmented batches by iteration; the same for every arm."""

    def __init__(self, data: Cifar10, seed: int, args: Any) -> None:
        x, y = data.images(seed, args.images)  # all of them, in an order of this seed
        self.x, self.y, self.args = x, torch.from_numpy(y), args
        self.generator = torch.Generator().manual_seed(seed)
        per_epoch = len(y) // args.batch_size
        orders = [torch.randperm(len(y), generator=self.generator) for _ in range(args.epochs)]
        self.rows = [row for order in orders for row in order[: per_epoch * args.batch_size].view(per_epoch, -1)]

    def __len__(self) -> int:
        return len(self.rows)

    def __call__(self, iteration: int) -> tuple[Tensor, Tensor]:
        rows = self.rows[iteration]
        x = F.pad(normalised(self.x[rows.numpy()]), (4, 4, 4, 4))
        shift = torch.randint(0, 9, (len(rows), 2), generator=self.generator)
        flip = torch.rand(len(rows), generator=self.generator) < 0.5
        crops = [a[:, i : i + 32, j : j + 32] for a, (i, j) in zip(x, shift.tolist(), strict=True)]
        x = torch.stack([c.flip(2) if f else c for c, f in zip(crops, flip.tolist(), strict=True)])
        x = x.to(self.args.device).contiguous(memory_format=torch.channels_last)
        return x, self.y[rows].to(self.args.device)


def run(net: Network, arm: str, kept: float, seed: int, args: Any, data: Cifar10) -> dict[str, Any]:
    """One cell of the table."""
    torch.manual_seed(seed)
    batches = Batches(data, seed, args)
    model = net.fresh().to(memory_format=torch.channels_last)
    dense = count_ops(model, net.inputs)[0]
    job = Training(model, net.inputs, batches, len(batches), args.lr, net.ignored, args.bfloat16)
    began = time.perf_counter()
    found = prune(arm, job, kept)
    seconds = time.perf_counter() - began
    assert job.iteration == len(batches)
    macs = count_ops(job.model, net.inputs)[0]
    assert arm == "dense" or macs <= kept * dense, (arm, macs / dense)
    return {
        "top1": round(data.accuracy(job.model, args.n_test, args.device), 3),
        "macs": macs / dense,
        "steps": len(batches),
        "seconds": round(seconds, 1),
        **found,
    }


def table(results: dict[str, Any]) -> str:
    """Mean ± standard deviation over seeds."""
    cells = [flat(cell) for cell in results["cells"]]
    columns = sorted({(c["network"], c["kept"]) for c in cells})
    rows = []
    for arm in ARMS:
        mine = [[c["top1"] for c in cells if (c["arm"], c["network"], c["kept"]) == (arm, *k)] for k in columns]
        if any(mine):
            spread = [f" ± {np.std(t, ddof=1):.2f}" if len(t) > 1 else "" for t in mine]
            rows.append([arm, *(f"{np.mean(t):.2f}{s}" if t else "" for t, s in zip(mine, spread, strict=True))])
    return markdown(["arm", *(f"{name}, {kept:g} of the MACs" for name, kept in columns)], rows)


def main() -> None:
    p = parser(__doc__, "psap_cifar.json")
    add_data_arguments(p)
    p.set_defaults(threads=1)
    p.add_argument("--networks", nargs="+", choices=BLOCKS, default=["resnet20"])
    p.add_argument("--arms", nargs="+", choices=ARMS, default=list(FIVE))
    p.add_argument("--macs", type=float, nargs="+", default=[0.2], help="fractions of the MACs that are kept")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--epochs", type=int, default=2)
    p.add_argument("--images", type=int, default=50_000, help="training images")
    p.add_argument("--n-test", type=int, default=10_000, help="test images")
    p.add_argument("--batch-size", type=int, default=128)
    p.add_argument("--lr", type=float, default=0.02)
    p.add_argument("--bfloat16", action="store_true", help="train under autocast: 1.7 times faster on some CPUs")
    p.add_argument("--device", default="cpu")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    if not args.table:
        settings = {k: getattr(args, k) for k in ("epochs", "images", "n_test", "batch_size", "lr", "bfloat16")}
        cells = Cells(args.out, settings, environment(args.device, args.date))
        data = Cifar10.load(args.data_root, args.npz)
        for name in args.networks:
            net = Network(args.data_root, name, args.device)
            for seed in args.seeds:
                for arm in args.arms:
                    for kept in [1.0] if arm == "dense" else args.macs:
                        key = {"network": name, "kept": kept, "arm": arm, "seed": seed}
                        cells.fill(key, partial(run, net, arm, kept, seed, args, data))
    print(table(read_results(args.out)))


if __name__ == "__main__":
    main()
