"""A network, the images it is pruned and tested on, and what may be pruned in it."""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Callable, Iterator
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import networks
from benchmarks.data import IMAGENETTE_CLASSES, Batches, Cifar10, augmented, imagenette, normalised
from tp_importance import count_ops, prunable_groups, slice_classifier
from tp_importance.graph.groups import PrunableGroups

EFFICIENTNET, DIGITS = "efficientnet-lite0", "digits"
NAMES = (*networks.PRETRAINED, *networks.UNTRAINED, *networks.TRAINED, EFFICIENTNET, DIGITS)


class Task:
    """What all have in common; groups are found and verified once.

    Each has ``fresh()``, the network with its weights in eval mode; ``draw(seed, images)``, random training images as
    batches; ``top1(model, images, last=False)``, the accuracy on the first, or the last, test images in percent, which
    leaves the model in eval mode; and, to train, ``stream(seed, images, batch_size)``, at least so many images.

    Attributes:
        inputs: two images.
        stages: layers whose outputs a teacher may be compared in.
        layout: memory format to train in.
        kept: layers whose outputs stay; :attr:`whole` is the same task without this.
    """

    inputs: Tensor
    stages: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    layout = torch.contiguous_format
    fresh: Callable[[], nn.Module]
    draw: Callable[[int, int], Batches]
    top1: Callable[..., float]
    stream: Callable[[int, int, int], Iterator[tuple[Tensor, Tensor]]]

    def __init__(self, name: str, run: Any) -> None:
        self.name, self.device, self.run = name, run.device, run

    def steps(self, images: int, batch_size: int) -> int:
        """How many batches of a stream that is."""
        return max(math.ceil(images / batch_size), 1)

    def seeded(self, seed: int) -> Task:
        """The task with the split and the weights of a seed, if it has several."""
        return self

    @cached_property
    def model(self) -> nn.Module:
        """The unpruned network; not to be changed."""
        return self.fresh()

    @cached_property
    def groups(self) -> PrunableGroups:
        return prunable_groups(self.model, self.inputs, ignored_layers=self.kept_in(self.model))

    def kept_in(self, model: nn.Module) -> list[nn.Module]:
        """What :attr:`kept` names, for ``ignored_layers=`` of a copy."""
        return [model.get_submodule(name) for name in self.kept]

    @cached_property
    def whole(self) -> Task:
        """The task in which every channel that can go may go."""
        if not self.kept:
            return self
        other = type(self)(self.name, self.run)
        other.kept = ()
        return other

    def verified(self, found: PrunableGroups, _x: Any) -> dict[str, str]:
        """The verdict on :attr:`groups`, for ``verify=`` of pruners of other copies."""
        return {e.name: e.reason for e in self.groups.excluded if e.name in found.names}

    @cached_property
    def layers(self) -> list[str]:
        """What makes the channels that may go."""
        return [m.name for g in self.groups for m in g.producers]

    def ignored(self, model: nn.Module) -> list[nn.Module]:
        """Layers of a copy that pruners of the hosts must leave alone."""
        counted = (nn.Conv2d, nn.Linear)
        return [m for n, m in model.named_modules() if isinstance(m, counted) and n not in self.layers]

    def unpruned(self, n_test: int) -> dict[str, Any]:
        """Accuracy and cost before pruning."""
        macs, params = count_ops(self.model, self.inputs)
        return {"top1": round(self.top1(self.fresh(), n_test), 3), "macs": macs, "params": params}

    def copy(self) -> tuple[nn.Module, PrunableGroups]:
        """A fresh network and its groups."""
        model = self.fresh()
        return model, prunable_groups(model, self.inputs, ignored_layers=self.kept_in(model), verify=self.verified)


class Cifar(Task):
    """A CIFAR-10 ResNet; padded shortcuts: only channels inside the blocks may go (experiment option-a)."""

    stages = ("layer1", "layer2", "layer3")
    layout = torch.channels_last

    def __init__(self, name: str, run: Any) -> None:
        super().__init__(name, run)
        self.inputs = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(self.device)
        self.kept = ("conv1",) if name in networks.PRETRAINED else ()

    @cached_property
    def data(self) -> Cifar10:
        return cifar10(self.run.data_root, self.run.npz)

    def fresh(self) -> nn.Module:
        return networks.cifar_resnet(self.run.data_root, self.name).to(self.device)

    def draw(self, seed: int, images: int) -> Batches:
        return [(x.to(self.device), y.to(self.device)) for x, y in self.data.draw(seed, images)]

    def top1(self, model: nn.Module, images: int, last: bool = False) -> float:
        start = len(self.data.y_test) - images if last else 0
        return self.data.accuracy(model, images, self.device, start=start)

    def stream(self, seed: int, images: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        return augmented(self.data, images, seed, self.device, batch_size)

    def of_class(self, label: int) -> Tensor:
        """The test images of a class."""
        return normalised(self.data.x_test[self.data.y_test == label]).to(self.device)


class Stored(Task):
    """Data that are whole in memory."""

    train: Batches
    test: Batches

    def draw(self, seed: int, images: int) -> Batches:
        size = len(self.train[0][1])
        x, y = (torch.cat(part) for part in zip(*self.train, strict=True))
        if images >= len(y):
            return self.train
        some = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:images]
        return list(zip(x[some].split(size), y[some].split(size), strict=True))

    def top1(self, model: nn.Module, images: int, last: bool = False) -> float:
        """At most one half of the images if the last are told from the first."""
        model.eval()
        x, y = (torch.cat(part) for part in zip(*self.test, strict=True))
        part = slice(-images, None) if last else slice(images)
        with torch.inference_mode():
            guesses = torch.cat([model(some).argmax(1) for some in x[part].split(50)])
        return 100.0 * float((guesses == y[part]).double().mean())

    def of_class(self, label: int) -> Tensor:
        return torch.cat([x[y == label] for x, y in self.test])


class EfficientNet(Stored):
    """EfficientNet-Lite0 cut to the ten classes of Imagenette."""

    def __init__(self, name: str, run: Any) -> None:
        super().__init__(name, run)
        whole = networks.efficientnet_lite0()  # first: without the package, the cells are left out
        parts = imagenette(run.data_root)
        self.train, self.test = ([(x.to(self.device), y.to(self.device)) for x, y in part] for part in parts)
        self.inputs, self._whole = self.train[0][0][:2], whole.to(self.device)

    def fresh(self) -> nn.Module:
        return slice_classifier(self.whole(), IMAGENETTE_CLASSES)

    def whole(self) -> nn.Module:
        """With all 1,000 outputs."""
        return copy.deepcopy(self._whole)


class Digits(Stored):
    """The residual CNN of examples/quickstart.py on scikit-learn's digits; split and weights by seed."""

    def __init__(self, name: str, run: Any, seed: int = 0) -> None:
        super().__init__(name, run)
        self.seed = seed
        parts = quickstart().digits(seed)
        self.train, self.calibration, self.test = ([(x.to(run.device), y.to(run.device)) for x, y in p] for p in parts)
        self.inputs = self.train[0][0][:2]

    def seeded(self, seed: int) -> Digits:
        return Digits(self.name, self.run, seed)

    def trained(self, epochs: int) -> nn.Module:
        """After some epochs at learning rate 0.05."""
        return copy.deepcopy(trained_on_digits(self.seed, epochs, self.device))

    def fresh(self) -> nn.Module:
        return self.trained(10).eval()

    def stream(self, seed: int, images: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Its own batches of 64, in a random order per epoch, without end."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield from (self.train[i] for i in torch.randperm(len(self.train), generator=generator).tolist())

    def steps(self, images: int, batch_size: int) -> int:
        return max(round(images * len(self.train) / sum(len(y) for _, y in self.train)), 1)


def quickstart() -> Any:
    return importlib.import_module("examples.quickstart")


@cache
def trained_on_digits(seed: int, epochs: int, device: str) -> nn.Module:
    torch.manual_seed(seed)
    model = quickstart().build().to(device)
    if epochs:
        training = [(x.to(device), y.to(device)) for x, y in quickstart().digits(seed)[0]]
        quickstart().train(model, training, epochs, 0.05, seed)
    return model


cifar10 = cache(Cifar10.load)


def task(name: str, run: Any) -> Task:
    """The task of that name, one of :data:`NAMES`."""
    if name not in NAMES:
        raise SystemExit(f"there is no network {name!r}; known: {', '.join(NAMES)}")
    kinds: dict[str, type[Task]] = {EFFICIENTNET: EfficientNet, DIGITS: Digits}
    return kinds.get(name, Cifar)(name, run)
