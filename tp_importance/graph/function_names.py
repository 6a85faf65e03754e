"""What functions of torch are called, in passes under a ``TorchFunctionMode``."""

from __future__ import annotations

from typing import Any

__all__ = ["function_name"]


def function_name(func: Any) -> str:
    """Name of a function of torch, without underscores around it: ``add`` is also ``add_`` and ``__add__``."""
    return getattr(func, "__name__", str(func)).strip("_")
