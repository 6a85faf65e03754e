"""Optional packages of the extra ``automl``."""

from __future__ import annotations

import importlib
from typing import Any

from ..errors import MissingPackageError

__all__ = ["optional_import"]


def optional_import(module: str) -> Any:
    """Import a module of the extra ``automl``.

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
            'pip install "tp-importance[automl]"'
        ) from error
