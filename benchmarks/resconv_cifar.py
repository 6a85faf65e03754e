"""Fewer layers against fewer channels on a pretrained CIFAR-10 ResNet, at equal MACs and equal training.

Every arm starts from the pretrained network and sees the same number of training images. Layers go either after
training with L1 on their scaling factors (the paper's way), or at once, by what the output loses (ours);
the rest of the images fine-tunes. Channels go at once: L2 with one ratio, and CATRO. Latency and peak memory of a
forward pass are those of the finished networks, batch norms folded into the convolutions in all of them (--measure, on
a quiet machine). Run again, it goes on where it stopped.
"""

from __future__ import annotations

import copy
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from cifar import BLOCKS, Cifar10, network
from cifar_training import train
from common import FOLLOWED, Cells, add_data_arguments, environment, flat, markdown, parser, read_results
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer

from tp_importance import (
    Budget,
    BudgetPruner,
    CATROImportance,
    ResConvPruner,
    count_ops,
    fuse,
    load_pruned,
    save_pruned,
)

ARMS = ("layers, L1", "layers, output", "channels, L2", "channels, CATRO")
CHANNELS = {
    "channels, L2": (lambda: tp.importance.MagnitudeImportance(p=2, normalizer=None), "uniform"),
    "channels, CATRO": (CATROImportance, "greedy"),
}
INPUTS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def run(name: str, arm: str, kept: float, seed: int, args: Any, data: Cifar10) -> dict[str, Any]:
    """One cell: prune, train on what is left of the images, measure the accuracy, save the network."""
    model, loader = network(args.data_root, name), data.draw(seed, args.draw)
    spent = 0
    if arm == "layers, L1":
        spent = args.train_images // 2
        model, loader = sparse(name, spent, seed, args, data), data.draw(seed, args.draw)
    if arm.startswith("layers"):
        importance = "scale" if arm == "layers, L1" else "output"
        pruner = ResConvPruner(model, INPUTS, loader, budget=Budget(macs=kept), importance=importance)
        report: Any = pruner.step(fuse=False, refit="batchnorm")
        what = {"removed": report.removed, "collapsed": list(report.collapsed)}
    else:
        make, allocator = CHANNELS[arm]
        channels = BudgetPruner(model, INPUTS, loader, importance=make(), budget=Budget(macs=kept), allocator=allocator)
        report = channels.step(refit="batchnorm")
        what = {"widths": [row.after for row in report.rows]}
    at_once = data.accuracy(model, args.n_test, args.device)
    train(model, data, args.train_images - spent, lr=args.lr, seed=seed + 1, device=args.device)
    if arm.startswith("layers"):
        fuse(model)
    macs, params = count_ops(model.cpu(), INPUTS)
    save_pruned(model, path_of(args, name, arm, kept, seed))
    top1 = data.accuracy(model, args.n_test, args.device)
    return {"at_once": round(at_once, 2), "top1": round(top1, 2), "macs": macs, "params": params, **what}


def sparse(name: str, images: int, seed: int, args: Any, data: Cifar10) -> nn.Module:
    """The converted network after training with L1 on the scaling factors; kept, as all budgets start from it."""
    model = network(args.data_root, name)
    pruner = ResConvPruner(model, INPUTS, budget=Budget(macs=0.5), reg=args.reg)
    path = args.work / f"{name}-sparse-{images}-{args.reg}-{seed}.pt"
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
    else:
        groups = pruner.parameter_groups(weight_decay=5e-4, lr=args.scalar_lr)
        train(
            model, data, images, lr=args.lr, seed=seed, groups=groups, after_step=pruner.regularize, device=args.device
        )
        torch.save(model.cpu().state_dict(), path)
    values = {n: (round(v.s.item(), 3), round(v.a.item(), 3)) for n, v in pruner.layers.items()}
    print(
        f"{name} after L1 on {images} images: top-1 {data.accuracy(model, args.n_test):.2f}, (s, a): {values}",
        flush=True,
    )
    return model.cpu()


def path_of(args: Any, name: str, arm: str, kept: float, seed: int) -> Path:
    return args.work / f"{name}-{arm.replace(', ', '-')}-{kept}-{seed}.pt"


def measure(name: str, arm: str, kept: float, batch: int, seed: int, args: Any) -> dict[str, Any]:
    """Latency and peak memory of one forward pass of a finished network."""

    def factory() -> nn.Module:
        return network(args.data_root, name)

    model = factory() if arm == "dense" else load_pruned(factory, path_of(args, name, arm, kept, seed))
    model = folded(model.eval())
    x = torch.randn(batch, 3, 32, 32)
    with torch.inference_mode():
        timer = Timer("model(x)", globals={"model": model, "x": x}, num_threads=args.threads)
        found = timer.blocked_autorange(min_run_time=args.seconds)
    low, high = np.percentile(found.times, [25, 75]) * 1e3
    return {
        "ms": round(found.median * 1e3, 4),
        "quartiles_ms": [round(float(low), 4), round(float(high), 4)],
        "runs": len(found.times) * found.number_per_run,
        "peak_mb": round(peak_bytes(model, x) / 2**20, 4),
    }


def folded(model: nn.Module) -> nn.Module:
    """Batch norms folded into the convolutions before them, by torch.fx: what an inference engine does."""
    from torch.fx.experimental.optimization import fuse as fold_batchnorms

    return fold_batchnorms(copy.deepcopy(model))


def peak_bytes(model: nn.Module, x: Tensor) -> int:
    """Largest sum of bytes allocated during a forward pass, parameters and input not counted."""
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        model(x)
    assert record.profiler is not None and record.profiler.kineto_results is not None
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return int(np.cumsum(sizes).max(initial=0))


def table(results: dict[str, Any]) -> str:
    """Accuracy, cost, latency and memory per arm."""
    cells = [flat(cell) for cell in results["cells"]]
    timed = {(c["network"], c["arm"], c["kept"], c["batch"]): c for c in cells if "ms" in c}
    batches = sorted({key[3] for key in timed})
    timings = [f"{what}, batch {b}" for b in batches for what in ("ms", "peak MB")]
    header = ["network", "MACs kept", "arm", "at once", "top-1", "MACs", "params", *timings]
    rows = []
    for c in sorted((c for c in cells if "top1" in c), key=lambda c: (c["network"], -c["kept"])):
        at_once = f"{c['at_once']:.2f}" if c["kept"] < 1 else ""
        cost = [f"{c['macs'] / 1e6:.2f} M", f"{c['params'] / 1e6:.3f} M"]
        rows.append([c["network"], f"{c['kept']:g}", c["arm"], at_once, f"{c['top1']:.2f}", *cost])
        for b in batches:
            t = timed.get((c["network"], c["arm"], c["kept"], b))
            rows[-1] += [f"{t['ms']:.3f}", f"{t['peak_mb']:.2f}"] if t else ["", ""]
    return markdown(header, rows)


def main() -> None:
    p = parser(__doc__, "resconv_cifar.json")
    add_data_arguments(p)
    p.add_argument("--networks", nargs="+", choices=BLOCKS, default=["resnet56"])
    p.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    p.add_argument("--macs", type=float, nargs="+", default=[0.7, 0.5], help="fractions of the MACs that are kept")
    p.add_argument("--train-images", type=int, default=50_000, help="training images per cell")
    p.add_argument("--draw", type=int, default=200, help="training images the criteria see")
    p.add_argument("--lr", type=float, default=0.02)
    p.add_argument("--scalar-lr", type=float, default=0.1, help="learning rate of s and a")
    p.add_argument("--reg", type=float, default=0.1, help="λ of the L1 term")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--n-test", type=int, default=10_000)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--work", type=Path, default=Path("outputs/resconv"), help="folder for networks")
    p.add_argument("--measure", action="store_true", help="time the networks that are there instead of training")
    p.add_argument("--batches", type=int, nargs="+", default=[1, 64])
    p.add_argument("--seconds", type=float, default=5.0, help="per latency measurement")
    args = p.parse_args()
    if not args.table:
        torch.set_num_threads(args.threads)
        warnings.filterwarnings("ignore", message=".*batch norm.*")
        args.work.mkdir(parents=True, exist_ok=True)
        names = ("train_images", "draw", "lr", "scalar_lr", "reg", "n_test")
        cells = Cells(args.out, {n: getattr(args, n) for n in names} | FOLLOWED, environment(args.device, args.date))
        data = None if args.measure else Cifar10.load(args.data_root, args.npz)
        for name in args.networks:
            for kept, arm in [(1.0, "dense"), *((k, a) for k in args.macs for a in args.arms)]:
                key = {"network": name, "arm": arm, "kept": kept, "seed": args.seed}
                if data is None:
                    for batch in args.batches:
                        timing = partial(measure, name, arm, kept, batch, args.seed, args)
                        cells.fill({**key, "batch": batch, "threads": args.threads}, timing)
                elif arm == "dense":
                    cells.fill(key, partial(dense, name, args, data))
                else:
                    cells.fill(key, partial(run, name, arm, kept, args.seed, args, data))
    print(table(read_results(args.out)))


def dense(name: str, args: Any, data: Cifar10) -> dict[str, Any]:
    model = network(args.data_root, name)
    macs, params = count_ops(model, INPUTS)
    return {
        "at_once": 0.0,
        "top1": round(data.accuracy(model, args.n_test, args.device), 2),
        "macs": macs,
        "params": params,
    }


if __name__ == "__main__":
    main()
