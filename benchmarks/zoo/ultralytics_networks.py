"""YOLO networks of ultralytics, as they are trained (raw heads) and as they are used (decoded boxes)."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from benchmarks.zoo.entry import Network, image

SIZES = {"yolov5n": 640, "yolov8n": 640, "yolov9t": 640, "yolov10n": 640, "yolo11n": 640}
QUICK = ("yolov8n", "yolo11n")


def _build(name: str) -> nn.Module:
    os.environ.setdefault("YOLO_OFFLINE", "true")  # nothing here needs the network
    os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.gettempdir())
    from ultralytics.nn.tasks import DetectionModel

    return DetectionModel(f"{name}.yaml", ch=3, nc=80, verbose=False)


def decoded(model: Any, x: Tensor) -> Tensor:
    """The boxes alone: beside them the model returns the features that its heads read, which would have to stay."""
    return model(x)[0]


def raw_heads(model: Any, x: Tensor) -> dict[str, Any]:
    """The detector as the loss sees it: its heads do not decode boxes in training mode."""
    model.model[-1].training = True
    try:
        return _without_features(model(x))
    finally:
        model.model[-1].training = False


def _without_features(found: dict[str, Any]) -> dict[str, Any]:
    return {k: _without_features(v) if isinstance(v, dict) else v for k, v in found.items() if k != "feats"}


def networks() -> Iterator[Network]:
    for name, size in SIZES.items():
        build = partial(_build, name)
        quick = name in QUICK
        yield Network(name, "ultralytics", build, image(size), decoded, "decoded boxes", quick)
        yield Network(f"{name}-train", "ultralytics", build, image(size), raw_heads, "raw heads", quick)
