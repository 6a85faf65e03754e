"""Training on CIFAR-10 images with the usual augmentation, counted in images, not epochs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from cifar import Cifar10, normalised
from torch import Tensor, nn

BATCH = 128


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``loss(output, x, y)``."""


def augmented(
    data: Cifar10, images: int, seed: int, device: str = "cpu", batch_size: int = BATCH
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of randomly shifted (by up to 4 pixels) and flipped training images, ``images`` of them in all."""
    generator = torch.Generator().manual_seed(seed)
    x, y = data.images(seed, 50_000)
    labels = torch.from_numpy(y)
    left = images
    while left > 0:
        for chosen in torch.randperm(len(x), generator=generator).split(batch_size):
            chosen = chosen[:left]
            if len(chosen) < 2:
                return
            left -= len(chosen)
            shift = torch.randint(0, 9, (2, len(chosen)), generator=generator)
            rows, columns = (shift[i].view(-1, 1) + torch.arange(32) for i in (0, 1))
            mirrored = torch.rand(len(chosen), generator=generator) < 0.5
            columns = torch.where(mirrored.view(-1, 1), columns.flip(1), columns)
            batch = F.pad(normalised(x[chosen.numpy()]), (4, 4, 4, 4)).permute(0, 2, 3, 1)
            batch = batch[torch.arange(len(chosen)).view(-1, 1, 1), rows.unsqueeze(2), columns.unsqueeze(1)]
            yield batch.permute(0, 3, 1, 2).to(device), labels[chosen].to(device)


def train(
    model: nn.Module,
    data: Cifar10,
    images: int,
    *,
    lr: float,
    seed: int,
    groups: list[dict[str, Any]] | None = None,
    after_step: Callable[[torch.optim.Optimizer], None] | None = None,
    weight_decay: float = 5e-4,
    device: str = "cpu",
    loss: Loss = lambda output, x, y: F.cross_entropy(output, y),
    batch_size: int = BATCH,
    warmup: float = 0.0,
    freeze_bn: bool = False,
    bfloat16: bool = False,
) -> nn.Module:
    """SGD with momentum 0.9 on ``images`` images, the learning rate falling to 0 by a half cosine.

    Before that it rises linearly during ``warmup``, a fraction of the steps; ``freeze_bn`` keeps batch norms in eval
    mode; ``bfloat16`` runs forward passes and the loss under autocast.
    """
    model.train().to(device, memory_format=torch.channels_last)
    for m in model.modules() if freeze_bn else ():
        if isinstance(m, nn.BatchNorm2d):
            m.eval()
    parameters = groups or [{"params": list(model.parameters())}]
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=weight_decay)
    steps = max(math.ceil(images / batch_size), 1)
    rising = round(warmup * steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: (
            (i + 1) / (rising + 1)
            if i < rising
            else 0.5 * (1 + math.cos(math.pi * (min(i, steps) - rising) / (steps - rising)))
        ),
    )
    for x, y in augmented(data, images, seed, device, batch_size):
        x = x.contiguous(memory_format=torch.channels_last)
        optimizer.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bfloat16):
            value = loss(model(x), x, y)
        value.backward()
        optimizer.step()
        if after_step is not None:
            after_step(optimizer)
        schedule.step()
    return model.eval()
