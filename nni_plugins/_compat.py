"""The only place that imports NNI.

NNI 3.0 (October 2023) is the last release. Importing it can fail because of packages the user never asked for: its
optional imports catch nothing but ``ImportError``, so a torchvision or lightning that is installed yet broken takes
every ``nni.compression`` import down with it.
"""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType

__all__ = ["SUPPORTED_NNI", "NNIUnavailableError", "import_nni"]

SUPPORTED_NNI = "3.0"
INSTALL_HINT = 'pip install "tp-importance[nni]"'


class NNIUnavailableError(ImportError, RuntimeError):
    """NNI cannot be imported; the message carries the original reason and the command that installs it."""


def import_nni(name: str = "nni") -> ModuleType:
    """Import NNI or one of its modules; on failure say why and what to install.

    Args:
        name: dotted module name, ``"nni"`` or below it, e.g. ``"nni.compression.speedup"``.

    Returns:
        The imported module.

    Raises:
        NNIUnavailableError: The import failed, for whatever reason (also an ``ImportError`` and a ``RuntimeError``).

    Example:
        >>> import_nni("nni.compression.utils").Scaling.__name__  # doctest: +SKIP
        'Scaling'
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old torch interfaces, on every first import
            return importlib.import_module(name)
    except Exception as error:  # a broken optional dependency of NNI raises whatever it likes
        raise NNIUnavailableError(
            f"cannot import {name!r}, reason: {type(error).__name__}: {error}. The NNI adapters need NNI "
            f"{SUPPORTED_NNI} and its pins: {INSTALL_HINT}. If it is installed, repair or remove the package named in "
            "the reason."
        ) from error
