"""What some benchmarks need before: a small copy of the data, and networks that have no pretrained weights."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from benchmarks import networks, tasks
from benchmarks.data import DATA_ROOT, Cifar10, require
from benchmarks.training import train as training

LIMIT = 45_000_000


def subset(arguments: list[str]) -> None:
    """Pack what the CIFAR benchmarks need into a small folder: 35 MB of images, 4 MB of weights.

    For machines the whole data set cannot travel to; `run.py cifar --data-root FOLDER --npz
    FOLDER/cifar10-subset.npz` uses it.
    """
    p = argparse.ArgumentParser("run.py subset", description=subset.__doc__)
    p.add_argument("folder", type=Path, help="a folder that git ignores: the data must not be committed")
    p.add_argument("--data-root", type=Path, default=DATA_ROOT)
    p.add_argument("--draws", type=int, default=3)
    p.add_argument("--images", type=int, default=500, help="training images per draw")
    p.add_argument("--networks", nargs="+", default=["resnet20", "resnet56"])
    args = p.parse_args(arguments)
    data = Cifar10.load(args.data_root)
    draws = [data.images(seed, args.images) for seed in range(args.draws)]
    (args.folder / "weights").mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        args.folder / "cifar10-subset.npz",
        x_test=data.x_test,
        y_test=data.y_test.astype(np.uint8),
        x_draws=np.stack([x for x, _ in draws]),
        y_draws=np.stack([y for _, y in draws]).astype(np.uint8),
    )
    definition = require(args.data_root / "cifar_resnet.py", "the network definition")
    shutil.copyfile(definition, args.folder / "cifar_resnet.py")
    for name in args.networks:
        for path in (args.data_root / "weights").glob(f"{name}-*.th"):
            shutil.copyfile(path, args.folder / "weights" / path.name)
    size = sum(f.stat().st_size for f in args.folder.rglob("*") if f.is_file())
    print(f"{args.folder}: {size / 1e6:.1f} MB")
    if size > LIMIT:
        raise SystemExit(f"that is more than {LIMIT / 1e6:.0f} MB: take fewer draws or networks")


def train(arguments: list[str]) -> None:
    """Train a CIFAR-10 network for which there are no pretrained weights; they go to `outputs/`.

    Random crops and flips, SGD with momentum, the learning rate up and down once. A few epochs: good enough to compare
    pruning criteria on, far from the best that these networks reach.
    """
    p = argparse.ArgumentParser("run.py train", description=train.__doc__)
    p.add_argument("--data-root", type=Path, default=DATA_ROOT)
    p.add_argument("--network", choices=networks.TRAINED, default="resnet14-conv")
    p.add_argument("--epochs", type=int, default=6)
    p.add_argument("--lr", type=float, default=0.2, help="peak learning rate")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    args = p.parse_args(arguments)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    model = networks.coupled_resnet(networks.TRAINED[args.network])
    task = tasks.Cifar(args.network, SimpleNamespace(device="cpu", data_root=args.data_root, npz=None))
    options = {"lr": args.lr, "seed": args.seed, "nesterov": True, "warmup": 0.2}
    run = training(task, model, args.epochs * 50_000, **options)
    for epoch in range(args.epochs):
        run.run(run.total * (epoch + 1) // args.epochs - run.iteration)
        print(f"epoch {epoch + 1}: top-1 on 1,000 test images {task.top1(model, 1000):.2f}", flush=True)
    path = networks.weights_path(args.network)
    path.parent.mkdir(exist_ok=True)
    torch.save({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    print(f"{path.name}: top-1 {task.top1(model, 10_000):.2f}")


COMMANDS = {"subset": subset, "train": train}
