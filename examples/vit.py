"""Train a small vision transformer on scikit-learn's digits and prune it to half its MACs with several methods.

    python examples/vit.py                       # about two minutes on a CPU
    python examples/vit.py --attention dims      # dimensions of all heads instead of whole heads

Heads, MLPs and the residual stream, which every block reads through a norm and adds to, are groups like any other.
Every method prunes the same network without training: once as it is, once with the layers behind removed channels
refitted by least squares. The best network is saved, loaded again and, if `onnx` is installed, exported.
Every number is measured here; nothing is stored.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from tp_importance import (
    Budget,
    PSAPPruner,
    count_ops,
    export_onnx,
    load_pruned,
    measure_latency,
    prunable_groups,
    prune,
    save_pruned,
)
from tp_importance.errors import MissingPackageError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the package examples
from examples.quickstart import Batches, accuracy, batches, digits

METHODS = ("obs", "catro", "itpruner", "psap", "l1", "l2", "taylor", "random")


class Block(nn.Module):
    """Attention and a two-layer perceptron; both read the stream through a norm and add to it."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """For 8×8 images: patches of 2×2 pixels with learned positions, pre-norm blocks, mean over the patches."""

    def __init__(self, width: int = 48, heads: int = 6, hidden: int = 96, depth: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, 2)
        self.position = nn.Parameter(0.3 * torch.randn(1, 16, width))
        self.blocks = nn.Sequential(*(Block(width, heads, hidden) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(x)).mean(1))


def train(
    model: nn.Module, loader: Batches, epochs: int, seed: int, lr: float = 2e-3, pruner: PSAPPruner | None = None
) -> None:
    """AdamW, the learning rate rises and falls, batches in a seeded order; a pruner may work along."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * len(loader), pct_start=0.1)
    if pruner is not None:
        pruner.start(optimizer, total_steps=epochs * len(loader))
    model.train()
    for _ in range(epochs):
        for i in torch.randperm(len(loader), generator=generator).tolist():
            x, y = loader[i]
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            if pruner is not None:
                pruner.step()
            schedule.step()
    if pruner is not None:
        pruner.finish()
    model.eval()


def smaller(loader: Batches, size: int = 32) -> Batches:
    """The same images in batches of another size."""
    x, y = (torch.cat(part) for part in zip(*loader, strict=True))
    return batches(x, y, size)


def check_loads(model: nn.Module, path: Path, x: Tensor) -> None:
    """Save, load into a new dense network, compare."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_pruned(model, path)
    loaded = load_pruned(VisionTransformer, path)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(x), model(x))
    print(f"saved, loaded into a new network, same outputs: {path}")


def check_exports(model: nn.Module, path: Path, x: Tensor) -> None:
    """Export for any batch size, tried in onnxruntime, if that is there."""
    try:
        export_onnx(model, x, path)
    except MissingPackageError as error:
        print(f"no ONNX export: {error}")
    else:
        print(f"exported, same outputs in onnxruntime: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--macs", type=float, default=0.5, help="fraction of the MACs to keep (default 0.5)")
    parser.add_argument("--attention", choices=["heads", "dims", "none"], default="heads", help="what can go of it")
    parser.add_argument("--epochs", type=int, default=30, help="training epochs of the dense network (default 30)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("outputs/vit"), help="folder for the best pruned network")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # the network is too small for more

    training, calibration, test = digits(args.seed)
    dense, images = VisionTransformer(), test[0][0]
    x = images[:2]
    start = time.perf_counter()
    train(dense, smaller(training), args.epochs, args.seed)
    print(f"dense network trained in {time.perf_counter() - start:.0f} s", flush=True)
    print(prunable_groups(dense, x, attention=args.attention))

    models: dict[str, nn.Module] = {"dense": dense}
    before = accuracy(dense, test)
    rows: dict[str, list[Any]] = {"dense": [*count_ops(dense, x), before, before]}
    for method in tqdm(args.methods, desc="pruning"):
        found = []
        for refit in (None, "sequential"):
            model = copy.deepcopy(dense)
            options = {"budget": Budget(macs=args.macs), "attention": args.attention}
            prune(model, x, calibration, method=method, refit=refit, **options)
            found.append(accuracy(model, test))
        models[method] = model
        rows[method] = [*count_ops(model, x), *found]

    columns = ["MACs", "params", "pruned %", "and refitted %"]
    table = pd.DataFrame.from_dict(rows, orient="index", columns=columns)
    for size in (1, 32):
        table[f"ms / {size}"] = [measure_latency(m, images[:size], min_run_time=0.3).median_ms for m in models.values()]
    counts = {column: "{:,.0f}".format for column in ("MACs", "params")}
    decimals = {f"ms / {size}": "{:.2f}".format for size in (1, 32)}
    print(table.to_string(formatters=counts | decimals, float_format="{:.1f}".format))

    best = str(table["and refitted %"].drop(index="dense").idxmax())
    print(f"\n{best}:")
    check_loads(models[best], args.out / "pruned.pt", images)
    check_exports(models[best], args.out / "pruned.onnx", images)


if __name__ == "__main__":
    main()
