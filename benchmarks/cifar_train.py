"""Train the CIFAR-10 networks for which there are no pretrained weights, for the benchmarks that need them.

Random crops and flips, SGD with momentum, one cycle of the learning rate. The weights go to `outputs/`. A few epochs:
good enough to compare pruning criteria on, far from the best that these networks reach.
"""

from __future__ import annotations

import argparse
import time

import torch
from cifar import TRAINED, Cifar10, coupled_resnet, normalised, weights_path
from common import add_data_arguments
from torch import Tensor, nn


def augmented(x: Tensor, generator: torch.Generator) -> Tensor:
    """Random crops of the padded images and flips, shape (B, 3, 32, 32)."""
    n = len(x)
    padded = nn.functional.pad(x, (4, 4, 4, 4))
    rows, columns = (torch.randint(9, (n, 1), generator=generator) + torch.arange(32) for _ in range(2))
    flip = torch.rand(n, 1, generator=generator) < 0.5
    columns = torch.where(flip, columns.flip(1), columns)
    return padded[torch.arange(n)[:, None, None, None], torch.arange(3)[:, None, None], rows[:, None, :, None],
                  columns[:, None, None, :]]  # fmt: skip


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int, lr: float, seed: int, batch: int = 128) -> None:
    generator = torch.Generator().manual_seed(seed)
    steps = len(x) // batch
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * steps, pct_start=0.2)
    model.train().to(memory_format=torch.channels_last)
    for epoch in range(epochs):
        start, total = time.perf_counter(), 0.0
        for chosen in torch.randperm(len(x), generator=generator)[: steps * batch].split(batch):
            images = augmented(x[chosen], generator).contiguous(memory_format=torch.channels_last)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), y[chosen])
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        print(f"epoch {epoch + 1}: loss {total / steps:.3f}, {time.perf_counter() - start:.0f} s", flush=True)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_data_arguments(p)
    p.add_argument("--network", choices=TRAINED, default="resnet14-conv")
    p.add_argument("--epochs", type=int, default=6)
    p.add_argument("--lr", type=float, default=0.2, help="peak learning rate")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    data = Cifar10.load(args.data_root, args.npz)
    x, y = data.images(0, 50_000)
    model = coupled_resnet(TRAINED[args.network])
    train(model, normalised(x), torch.from_numpy(y).long(), args.epochs, args.lr, args.seed)
    path = weights_path(args.network)
    path.parent.mkdir(exist_ok=True)
    torch.save({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    print(f"{path.name}: top-1 {data.accuracy(model, batch_size=100):.2f}")


if __name__ == "__main__":
    main()
