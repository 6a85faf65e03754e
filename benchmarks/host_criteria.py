"""Criteria of the hosts as importances: gradients for Torch-Pruning's, metrics from NNI's own pruners."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch_pruning as tp
from cifar import Batches
from torch import Tensor, nn
from torch.nn import functional as F


def accumulate_gradients(model: nn.Module, batches: Batches) -> None:
    """Gradients of the mean cross-entropy over all batches, in eval mode, as Torch-Pruning's Taylor reads them."""
    samples = sum(len(y) for _, y in batches)
    model.zero_grad()
    for x, y in batches:
        (F.cross_entropy(model(x), y, reduction="sum") / samples).backward()


class Fixed(tp.importance.Importance):
    """Scores that are known per layer: those of the group's root."""

    def __init__(self, model: nn.Module, scores: dict[str, Tensor]) -> None:
        self._scores = {model.get_submodule(name): score for name, score in scores.items()}

    def __call__(self, group: Any) -> Tensor:
        return self._scores[group[0].dep.target.module][group[0].idxs]


def nni_metrics(kind: str, model: nn.Module, batches: Batches, layers: list[str]) -> dict[str, Tensor]:
    """What NNI 3.0's own pruner scores the filters of ``layers`` with, on a copy of the model.

    Args:
        kind: ``"l1"`` (L1NormPruner), ``"fpgm"`` (FPGMPruner) or ``"taylor"`` (TaylorPruner: the mean over batches of
            Σ (w·g)² per filter, collected by NNI's hooks while its evaluator trains at learning rate 0 in eval mode).
        model: the network.
        batches: images and labels; only ``"taylor"`` looks at them.
        layers: convolutions to score.

    Raises:
        ImportError: if NNI cannot be imported.
    """
    import nni
    from nni.compression import TorchEvaluator
    from nni.compression.pruning import FPGMPruner, L1NormPruner, TaylorPruner

    twin = copy.deepcopy(model)
    config = [{"op_names": layers, "sparse_ratio": 0.5}]  # the ratio is not used: only the metrics are
    if kind == "taylor":
        optimizer = nni.trace(torch.optim.SGD)(twin.parameters(), lr=0.0)
        evaluator = TorchEvaluator(_training(batches), optimizer, _training_step)
        pruner: Any = TaylorPruner(twin, config, evaluator, training_steps=len(batches))
    else:
        pruner = {"l1": L1NormPruner, "fpgm": FPGMPruner}[kind](twin, config)
    seen: list[Any] = []
    calculate = pruner._calculate_metrics
    pruner._calculate_metrics = lambda data: seen.append(calculate(data)) or seen[-1]  # gone after compress()
    pruner.compress()
    return {name: targets["weight"].flatten().detach() for name, targets in seen[0].items()}


def _training_step(batch: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
    x, y = batch
    return F.cross_entropy(model(x), y)


def _training(batches: Batches) -> Any:
    def train(
        model: nn.Module,
        optimizers: Any,
        training_step: Any,
        lr_schedulers: Any = None,
        max_steps: int | None = None,
        max_epochs: int | None = None,
    ) -> None:
        model.eval()
        for batch in batches[:max_steps]:
            optimizers.zero_grad()
            training_step(batch, model).backward()
            optimizers.step()

    return train
