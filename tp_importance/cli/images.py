"""A folder of images as a re-iterable of batches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..core.optional import optional_import

__all__ = ["ImageFolder"]

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation per channel."""


class ImageFolder:
    """Images below a folder, drawn at random, resized, cropped at the centre and normalised.

    Images in subfolders get the position of their subfolder as label; images beside each other in one folder have none.

    Args:
        folder: where to look, subfolders included.
        count: images at most.
        batch_size: images per batch.
        size: of the square crop in pixels; the shorter side is resized to 256/224 of it.
        mean: per channel.
        std: per channel.
        seed: of the draw.

    Attributes:
        paths: the images that were drawn.
        classes: names of the subfolders, sorted; empty if there are none.

    Raises:
        ValueError: if there is no image.
    """

    def __init__(
        self,
        folder: Path,
        *,
        count: int,
        batch_size: int,
        size: int = 224,
        mean: tuple[float, ...] = IMAGENET[0],
        std: tuple[float, ...] = IMAGENET[1],
        seed: int = 0,
    ) -> None:
        transforms = optional_import("torchvision.transforms")
        found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not found:
            raise ValueError(f"--data {folder}: there is no image in it ({', '.join(sorted(SUFFIXES))})")
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed), device="cpu")
        self.paths = [found[i] for i in order[:count].tolist()]
        inside = [p.relative_to(folder).parts for p in found]
        self.classes = sorted({parts[0] for parts in inside}) if all(len(parts) > 1 for parts in inside) else []
        self._folder, self._batch_size = folder, batch_size
        self._transform = transforms.Compose(
            [
                transforms.Resize(round(size * 256 / 224)),
                transforms.CenterCrop(size),
                transforms.ToTensor(),
                transforms.Normalize(mean, std),
            ]
        )

    def __len__(self) -> int:
        return -(-len(self.paths) // self._batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for i in range(0, len(self.paths), self._batch_size):
            paths = self.paths[i : i + self._batch_size]
            x = torch.stack([self._transform(self._opened(p)) for p in paths])
            labels = [self.classes.index(p.relative_to(self._folder).parts[0]) for p in paths if self.classes]
            yield (x, torch.tensor(labels, device="cpu")) if labels else (x,)

    def _opened(self, path: Path) -> object:
        try:
            with optional_import("PIL.Image").open(path) as image:
                return image.convert("RGB")
        except OSError as error:
            raise ValueError(f"{path} cannot be read as an image: {error}; remove it") from error
