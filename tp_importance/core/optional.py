"""Packages of the extras, imported when they are needed."""

from __future__ import annotations

import importlib
from typing import Any

from ..errors import MissingPackageError

__all__ = ["optional_import"]

_EXTRAS = {
    "pandas": "report",
    "matplotlib": "report",
    "optuna": "automl",
    "cmaes": "automl",
    "ray": "automl",
    "pytest": "testing",
    "click": "cli",
    "PIL": "cli",
    "torchvision": "cli",
    "timm": "timm",
    "safetensors": "cli",
    "onnx": "onnx",
    "onnxscript": "onnx",
    "onnxruntime": "onnx",
}


def optional_import(module: str) -> Any:
    """Import a module of one of the extras.

    Args:
        module: dotted name.

    Raises:
        MissingPackageError: if it cannot be imported; names the package, the reason and the extra.
    """
    try:
        return importlib.import_module(module)
    except Exception as error:  # a package that is installed but broken raises whatever it likes
        package = module.split(".")[0]
        raise MissingPackageError(
            f"{package} is needed for this and cannot be imported ({type(error).__name__}: {error}); "
            f'pip install "tp-importance[{_EXTRAS[package]}]"'
        ) from error
