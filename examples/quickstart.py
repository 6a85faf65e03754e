"""Prune a small residual CNN on scikit-learn's digits to half its MACs, through both hosts, and compare.

    python examples/quickstart.py            # a table, and outputs/quickstart.png

Two games are shown. One shot: prune, let the batch norm statistics follow or refit the weights by least squares, test.
Fine-tuned: two epochs more, the same for everybody; PSAP prunes while it takes them. ResConv removes layers, the
others channels. Every number is measured here; nothing is stored.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch_pruning as tp
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

import nni_plugins
import tp_importance
from nni_plugins._compat import import_nni
from tp_importance import Refit
from tp_importance.graph.cost import CostModel
from tp_importance.methods.resconv import ResConv2d

Batches = list[tuple[Tensor, Tensor]]


class Block(nn.Module):
    """Basic residual block with a projection where the shape changes."""

    def __init__(self, c_in: int, c_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        same = c_in == c_out and stride == 1
        self.shortcut = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def build() -> nn.Sequential:
    """ResNet-8 with 16-32-64 channels for 8×8 images."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, 1, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        Block(16, 16),
        Block(16, 32, 2),
        Block(32, 64, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def batches(x: Tensor, y: Tensor, size: int = 64) -> Batches:
    return list(zip(x.split(size), y.split(size), strict=True))


def digits(seed: int) -> tuple[Batches, Batches, Batches]:
    """Training batches, 256 of them for calibration, and test batches."""
    x, y = load_digits(return_X_y=True)
    split = train_test_split(x, y, test_size=0.5, random_state=seed, stratify=y)
    x_train, x_test, y_train, y_test = (torch.from_numpy(a) for a in split)
    x_train, x_test = ((a.float() / 8 - 1).view(-1, 1, 8, 8) for a in (x_train, x_test))
    calibration = batches(x_train[:256], y_train[:256])
    return batches(x_train, y_train), calibration, batches(x_test, y_test, 512)


def train(
    model: nn.Module, loader: Batches, epochs: int, lr: float, seed: int, pruner: tp_importance.PSAPPruner | None = None
) -> None:
    """SGD with momentum and a cosine schedule, batches in a seeded order; a pruner may work along."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
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


@torch.inference_mode()
def accuracy(model: nn.Module, loader: Batches) -> float:
    model.eval()
    hits = sum(int((model(x).argmax(1) == y).sum()) for x, y in loader)
    return 100.0 * hits / sum(len(y) for _, y in loader)


@torch.inference_mode()
def latencies_ms(models: list[nn.Module], batch: Tensor, repeats: int = 21) -> list[float]:
    """Median time of one forward pass over ``batch`` on this CPU; the models take turns, so that load hits all."""
    times: list[list[float]] = [[] for _ in models]
    for _ in range(repeats + 2):
        for model, mine in zip(models, times, strict=True):
            start = time.perf_counter()
            model(batch)
            mine.append(1000 * (time.perf_counter() - start))
    return [statistics.median(mine[2:]) for mine in times]


def gradients(model: nn.Module, loader: Batches) -> None:
    """What first-order criteria look at."""
    model.zero_grad()
    for x, y in loader:
        nn.functional.cross_entropy(model(x), y).backward()


def torch_pruning_entries(budget: tp_importance.Budget, x: Tensor, loader: Batches) -> dict[str, Callable[..., None]]:
    """Pruners that change a model in place through Torch-Pruning."""

    def catro(model: nn.Module) -> None:
        tp_importance.CATROPruner(model, x, loader, budget=budget).step()

    def catro_literal(model: nn.Module) -> None:
        tp_importance.CATROPruner(model, x, loader, budget=budget, space="channel").step()

    def itpruner(model: nn.Module) -> None:
        tp_importance.ITPruner(model, x, loader, budget=budget).step()

    def resconv(model: nn.Module) -> None:
        pruner = tp_importance.ResConvPruner(model, x, loader, budget=budget, importance="output")
        pruner.step(fuse=False, refit=True)

    def host(importance: Any, needs_gradients: bool = False) -> Callable[[nn.Module], None]:
        def prune(model: nn.Module) -> None:
            if needs_gradients:
                gradients(model, loader)
            tp_importance.BudgetPruner(model, x, importance=importance, budget=budget, allocator="uniform").step()

        return prune

    return {
        "Torch-Pruning L1": host(tp.importance.MagnitudeImportance(p=1)),
        "Torch-Pruning Taylor": host(tp.importance.TaylorImportance(), needs_gradients=True),
        "Torch-Pruning CATRO": catro,
        "Torch-Pruning CATRO (literal)": catro_literal,
        "Torch-Pruning ITPruner": itpruner,
        "Torch-Pruning ResConv": resconv,
    }


def nni_entries(budget: tp_importance.Budget, x: Tensor, loader: Batches) -> dict[str, Callable[..., None]]:
    """Pruners that mask through NNI, whose ModelSpeedup, or our own surgery where that fails, removes the channels."""
    nni, pruning = import_nni(), import_nni("nni.compression.pruning")
    config_list = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]

    def speed_up(model: nn.Module, pruner: Any) -> None:
        _, masks = pruner.compress()
        pruner.unwrap_model()
        with warnings.catch_warnings():
            # NNI's own pruners leave the batch norm of a masked channel alone; here recalibration follows anyway
            warnings.filterwarnings("ignore", message="masked and sped-up network differ")
            nni_plugins.speedup(model, x, masks)

    def catro(model: nn.Module) -> None:
        speed_up(model, nni_plugins.CATROPruner(model, config_list, loader=loader, budget=budget))

    def itpruner(model: nn.Module) -> None:
        speed_up(model, nni_plugins.ITPruner(model, config_list, loader=loader, budget=budget))

    def coupled(model: nn.Module, ratio: float) -> list[dict[str, Any]]:
        """NNI prunes coupled layers together only if told which they are; our groups know."""
        return [
            {
                "op_names": [m.name for m in group.producers],
                "sparse_ratio": ratio,
                "target_settings": {"weight": {"dependency_group_id": group.name}},
            }
            for group in tp_importance.prunable_groups(model, x)
        ]

    def uniform_ratio(model: nn.Module) -> float:
        """The least common ratio that meets the budget: NNI itself knows no budget."""
        cost = CostModel.from_groups(tp_importance.prunable_groups(model, x))
        limit = budget.limits(cost.dense)["macs"]
        ratios = [r / 1000 for r in range(1000)]
        return next(r for r in ratios if cost.evaluate(cost.full - (cost.full * r).astype(int))[0] <= limit)

    def l1(model: nn.Module) -> None:
        speed_up(model, pruning.L1NormPruner(model, coupled(model, uniform_ratio(model))))

    def taylor(model: nn.Module) -> None:
        def loss(batch: Any, model: nn.Module) -> Tensor:
            return nn.functional.cross_entropy(model(batch[0]), batch[1])

        def one_pass(model: nn.Module, optimizer: Any, step: Any, *_: Any, **__: Any) -> None:
            for batch in loader:
                optimizer.zero_grad()
                step(batch, model).backward()
                optimizer.step()

        # NNI reads gradients inside a training run; a learning rate of 0 keeps the weights
        sgd = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.0)
        evaluator = import_nni("nni.compression.utils").TorchEvaluator(one_pass, sgd, loss)
        ratio = uniform_ratio(model)
        speed_up(model, pruning.TaylorPruner(model, coupled(model, ratio), evaluator, training_steps=len(loader)))

    def resconv(model: nn.Module) -> None:
        options: dict[str, Any] = {"loader": loader, "example_inputs": x, "importance": "output"}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="nothing was trained")  # here layers go at once
            pruner = nni_plugins.ResConvPruner(model, config_list[:1], budget=budget, **options)
            speed_up(model, pruner)

    return {"NNI L1": l1, "NNI Taylor": taylor, "NNI CATRO": catro, "NNI ITPruner": itpruner, "NNI ResConv": resconv}


def refit_entries(budget: tp_importance.Budget, x: Tensor, loader: Batches) -> dict[str, Callable[..., None]]:
    """What is left is refitted by least squares; batch norms are part of that."""

    def one_call(model: nn.Module) -> None:
        tp_importance.prune(model, x, loader, budget=budget)

    def nni_obs(model: nn.Module) -> None:
        pruner = nni_plugins.OBSPruner(model, [{"op_types": ["Conv2d"]}], loader=loader, budget=budget)
        _, masks = pruner.compress()
        pruner.unwrap_model()
        nni_plugins.refit_masks(model, masks, loader, x, Refit("sequential", recalibrate=False))
        nni_plugins.speedup(model, x, masks)

    return {"Torch-Pruning OBS + refit": one_call, "NNI OBS + refit": nni_obs}


def training_entries(
    budget: tp_importance.Budget, x: Tensor, loader: Batches, seed: int
) -> dict[str, Callable[..., None]]:
    """Pruners that work while the network trains: two epochs, as long as the others fine-tune."""
    nni = import_nni()
    epochs, lr = 2, 0.02

    def psap(model: nn.Module) -> None:
        train(model, loader, epochs, lr, seed, tp_importance.PSAPPruner(model, x, budget=budget))

    def nni_psap(model: nn.Module) -> None:
        def loss(batch: Any, model: nn.Module) -> Tensor:
            return nn.functional.cross_entropy(model(batch[0]), batch[1])

        def run(model: nn.Module, optimizer: Any, step: Any, *_: Any, **__: Any) -> None:
            generator = torch.Generator().manual_seed(seed)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
            model.train()
            for _ in range(epochs):
                for i in torch.randperm(len(loader), generator=generator).tolist():
                    optimizer.zero_grad()
                    step(loader[i], model).backward()
                    optimizer.step()
                    schedule.step()

        sgd = nni.trace(torch.optim.SGD)(model.parameters(), lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
        evaluator = import_nni("nni.compression.utils").TorchEvaluator(run, sgd, loss)
        pruner = nni_plugins.PSAPPruner(
            model, [{"op_types": ["Conv2d"]}], evaluator, budget=budget, example_inputs=x, loader=loader
        )
        _, masks = pruner.compress(max_epochs=epochs)
        pruner.unwrap_model()
        nni_plugins.speedup(model, x, masks)

    return {"Torch-Pruning PSAP": psap, "NNI PSAP": nni_psap}


def plot(table: pd.DataFrame, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="tight")
    axes = figure.add_subplot()
    rows = table.drop(index="dense")
    for column, marker in (("one shot %", "o"), ("fine-tuned %", "s")):
        axes.scatter(rows[column], range(len(rows)), marker=marker, label=column)
    axes.axvline(table.loc["dense", "one shot %"], color="0.5", linestyle="--", label="dense")
    axes.set_yticks(range(len(rows)), rows.index)
    axes.invert_yaxis()
    axes.set_xlabel("test accuracy on digits, %")
    axes.set_title("Half the MACs", fontsize=10)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--macs", type=float, default=0.5, help="fraction of the MACs to keep (default 0.5)")
    parser.add_argument("--epochs", type=int, default=15, help="training epochs of the dense network (default 15)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, default=Path("outputs/quickstart.png"))
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)  # of NNI 3.0, about torch
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # the network is too small for more, and a busy machine makes them wait for each other

    training, calibration, test = digits(args.seed)
    dense, x = build(), calibration[0][0][:2]
    start = time.perf_counter()
    train(dense, training, args.epochs, 0.05, args.seed)
    print(f"dense network trained in {time.perf_counter() - start:.0f} s", flush=True)

    budget = tp_importance.Budget(macs=args.macs)
    refitted = refit_entries(budget, x, calibration)
    entries = {**torch_pruning_entries(budget, x, calibration), **nni_entries(budget, x, calibration), **refitted}
    before = accuracy(dense, test)
    models = {"dense": dense}
    rows: dict[str, list[Any]] = {"dense": [*tp_importance.count_ops(dense, x), before, before]}
    for name, prune in tqdm(entries.items(), desc="pruning"):
        model = copy.deepcopy(dense)
        prune(model)
        converted = any(isinstance(module, ResConv2d) for module in model.modules())
        if name not in refitted and not converted:  # which has batch norms of its own, and has seen to them
            tp_importance.recalibrate_batchnorm(model, calibration, reference=dense)
        one_shot = accuracy(model, test)
        train(model, training, 2, 0.02, args.seed)
        if converted:
            tp_importance.fuse(model)
        models[name] = model
        rows[name] = [*tp_importance.count_ops(model, x), one_shot, accuracy(model, test)]
    for name, prune in tqdm(training_entries(budget, x, training, args.seed).items(), desc="pruning while training"):
        models[name] = copy.deepcopy(dense)
        prune(models[name])
        rows[name] = [*tp_importance.count_ops(models[name], x), float("nan"), accuracy(models[name], test)]

    images = test[0][0]
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["MACs", "params", "one shot %", "fine-tuned %"])
    table[f"ms / {len(images)} images"] = latencies_ms(list(models.values()), images)
    counts = {column: "{:,.0f}".format for column in ("MACs", "params")}
    print(table.to_string(formatters=counts, float_format="{:.1f}".format, na_rep="-"))
    report = tp_importance.CATROPruner(copy.deepcopy(dense), x, calibration, budget=budget).step()
    print(f"\nWhat Torch-Pruning CATRO did:\n{report}")
    plot(table, args.plot)
    print(f"\npicture: {args.plot}")


if __name__ == "__main__":
    main()
