"""One-shot pruning by other libraries, each imported where it is used: ``make rivals-venv`` installs them.

A rival takes a task, a fresh copy of its network, images with labels, uniform widths that meet the budget, and the most
MACs it may leave; it returns the pruned network. docs/benchmarks.md, "Against other libraries", says how it is called.
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from typing import Any
from unittest import mock

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.data import Batches
from benchmarks.networks import PRETRAINED
from benchmarks.tasks import Task
from tp_importance import count_ops, recalibrate_batchnorm

Widths = Mapping[str, int]
Rival = Callable[[Task, nn.Module, Batches, Widths, float], nn.Module]
BISECTIONS = 10


def closest(task: Task, prune: Callable[[float], nn.Module], most: float) -> nn.Module:
    """The network of most MACs, at most ``most``, over the fraction of channels that go."""
    low, high, best = 0.0, 1.0, None
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        model = prune(middle)
        if count_ops(model, task.inputs)[0] <= most:
            high, best = middle, model
        else:
            low = middle
    assert best is not None, "no fraction leaves so few MACs"
    return best


def followed(task: Task, model: nn.Module, batches: Batches) -> nn.Module:
    return recalibrate_batchnorm(model, batches, reference=task.fresh())


def taylor_gradients(model: nn.Module, batches: Batches) -> dict[str, Tensor]:
    """Of the mean loss over all images."""
    total = sum(len(y) for _, y in batches)
    model.zero_grad()
    for x, y in batches:
        (F.cross_entropy(model(x), y, reduction="sum") / total).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def squared_gradients(model: nn.Module, batches: Batches) -> dict[str, Tensor]:
    """Mean over images of the squares, as the importance describes it: its own sum keeps the last image only."""
    found = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    total = sum(len(y) for _, y in batches)
    for x, y in batches:
        for i in range(len(y)):
            model.zero_grad()
            F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()
            for n, p in model.named_parameters():
                if p.grad is not None:
                    found[n] += p.grad**2 / total
    return found


def torch_pruning(make: Callable[[], Any], gradients: Callable[[nn.Module, Batches], dict[str, Tensor]]) -> Rival:
    def rival(task: Task, model: nn.Module, batches: Batches, widths: Widths, most: float) -> nn.Module:
        found = gradients(model, batches)

        def prune(ratio: float) -> nn.Module:
            twin = copy.deepcopy(model)
            for n, p in twin.named_parameters():
                p.grad = found[n].clone()  # the host cuts it
            ignored = task.ignored(twin)
            pruner = tp.pruner.BasePruner(
                twin, task.inputs, make(), global_pruning=True, pruning_ratio=ratio, ignored_layers=ignored
            )
            pruner.step()
            twin.zero_grad()
            return twin

        return followed(task, closest(task, prune, most), batches)

    return rival


def osscar(task: Task, model: nn.Module, batches: Batches, widths: Widths, most: float) -> nn.Module:
    """The workflow of torch-kirigami's examples; its batch norms are best left alone."""
    import osscar_pruning as workflow
    from torch_kirigami import DependencyGraph
    from torch_kirigami.pruning import Pruner

    teacher = copy.deepcopy(model).requires_grad_(False).eval()
    x = task.inputs[:1]
    pairs, _ = workflow.discover_reconstruction_pairs(DependencyGraph.build(model, args=(x,)))
    for first, second in pairs.items():
        width = model.get_submodule(first).weight.shape[0]
        if widths.get(first, width) == width:
            continue
        with quiet():
            moments = workflow.collect_reconstruction(model, teacher, second, batches, task.device, 0, 4096)
        original = teacher.get_submodule(second).weight.detach().flatten(1).T
        found = workflow.solve_osscar(
            *moments.system(original, 0.01), width, widths[first], prune_batch=1, swap_steps=50
        )
        pruner = Pruner(model, graph=DependencyGraph.build(model, args=(x,)))
        workflow.apply_reconstruction(pruner, first, second, found)
    return model


def aimet(task: Task, model: nn.Module, batches: Batches, widths: Widths, most: float) -> nn.Module:
    """Input channels of the second convolutions; ten positions of every image; batch norms left alone."""
    from aimet_torch.common.defs import CompressionScheme, CostMetric
    from aimet_torch.compress import ModelCompressor
    from aimet_torch.defs import ChannelPruningParameters, ModuleCompRatioPair

    class Loader(list[Any]):
        batch_size = len(batches[0][1])

    twin = Modules(model).eval() if task.name in PRETRAINED else model
    pairs = [
        ModuleCompRatioPair(twin.get_submodule(g.consumers[0].name), Decimal(widths[g.name]) / Decimal(g.width))
        for g in task.groups
        if len(g.consumers) == len(g.producers) == 1
    ]
    mode = ChannelPruningParameters.ManualModeParams(pairs)
    images = sum(len(y) for _, y in batches)
    settings = ChannelPruningParameters(Loader(batches), 10 * images, True, ChannelPruningParameters.Mode.manual, mode)
    shape = (1, *task.inputs.shape[1:])
    scheme, cost = CompressionScheme.channel_pruning, CostMetric.mac
    with elsewhere(), quiet():
        found, _ = ModelCompressor.compress_model(twin, lambda *_: 0.0, None, shape, scheme, cost, settings)
    return found.put_back(model) if isinstance(found, Modules) else found


def fastnas(task: Task, model: nn.Module, batches: Batches, widths: Widths, most: float) -> nn.Module:
    """The score is the accuracy on the images; every width of its grid is allowed."""
    import modelopt.torch.prune as mtp

    def score(subnet: nn.Module) -> float:
        with torch.inference_mode():
            return sum(float((subnet(x).argmax(1) == y).sum()) for x, y in batches)

    config = mtp.fastnas.FastNASConfig().model_dump()
    for kind in ("nn.Conv2d", "nn.BatchNorm2d", "nn.Linear"):
        for rule in config[kind].values():
            rule |= {k: 4 for k in rule if k.endswith("_divisor")}
    fraction = 0.5
    while True:
        found = copy.deepcopy(model)
        search = {"data_loader": batches, "collect_func": lambda b: b[0], "score_func": score, "verbose": False}
        with elsewhere(), quiet():
            found, _ = mtp.prune(
                found, [("fastnas", config)], {"flops": f"{100 * fraction}%"}, task.inputs[:1], config=search
            )
        if count_ops(found, task.inputs)[0] <= most:
            return recalibrate_batchnorm(found, batches)
        fraction -= 0.01


def fasterai(task: Task, model: nn.Module, batches: Batches, widths: Widths, most: float) -> nn.Module:
    """Magnitudes, one ratio for all layers."""
    from fasterai.core.criteria import large_final
    from fasterai.prune.pruner import Pruner

    def prune(ratio: float) -> nn.Module:
        twin = copy.deepcopy(model)
        with quiet():
            pruner = Pruner(
                twin,
                ratio,
                "local",
                large_final,
                ignored_layers=task.ignored(twin),
                example_inputs=task.inputs,
            )
            pruner.prune_model()
        return twin

    return followed(task, closest(task, prune, most), batches)


class Modules(nn.Module):
    """The same function in modules, for AIMET, which reads no functions: a padded shortcut is a convolution."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = model.conv1, model.bn1, nn.ReLU()
        for stage in ("layer1", "layer2", "layer3"):
            setattr(self, stage, nn.Sequential(*map(ModulesBlock, getattr(model, stage))))
        self.pool, self.flatten, self.linear = nn.AdaptiveAvgPool2d(1), nn.Flatten(), model.linear

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.relu(self.bn1(self.conv1(x))))))
        return self.linear(self.flatten(self.pool(x)))

    def put_back(self, model: nn.Module) -> nn.Module:
        """The network itself, with the blocks' layers of this one."""
        for stage in ("layer1", "layer2", "layer3"):
            for block, mine in zip(getattr(model, stage), getattr(self, stage), strict=True):
                for name in ("conv1", "bn1", "conv2", "bn2"):
                    setattr(block, name, getattr(mine, name))
        return model


class ModulesBlock(nn.Module):
    def __init__(self, block: Any) -> None:
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.bn2 = block.conv1, block.bn1, block.conv2, block.bn2
        self.relu1, self.relu2, self.shortcut = nn.ReLU(), nn.ReLU(), None
        c_in, c_out = block.conv1.in_channels, block.conv1.out_channels
        if c_in != c_out:
            self.shortcut = nn.Conv2d(c_in, c_out, 1, block.st, bias=False)
            nn.init.zeros_(self.shortcut.weight)
            for i in range(c_in):
                self.shortcut.weight.data[block.pad + i, i] = 1

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(y + (x if self.shortcut is None else self.shortcut(x)))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without prints and progress bars."""
    nowhere = io.StringIO()
    off = mock.patch.dict(os.environ, {"TQDM_DISABLE": "1"})
    with off, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


@contextlib.contextmanager
def elsewhere() -> Iterator[None]:
    """In a temporary folder: some write files into the current one."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        yield


RIVALS: dict[str, tuple[str | None, Rival]] = {
    "Torch-Pruning Taylor": (None, torch_pruning(tp.importance.TaylorImportance, taylor_gradients)),
    "Torch-Pruning Hessian": (None, torch_pruning(tp.importance.HessianImportance, squared_gradients)),
    "OSSCAR (torch-kirigami)": ("osscar_pruning", osscar),
    "AIMET channel pruning": ("aimet_torch", aimet),
    "FastNAS (ModelOpt)": ("modelopt", fastnas),
    "fasterai": ("fasterai", fasterai),
}
"""The module that must be there, and the rival."""
