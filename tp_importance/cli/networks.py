"""Networks by name."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.optional import optional_import

__all__ = ["load_weights", "network"]


def network(name: str, *, pretrained: bool = False, classes: int | None = None) -> nn.Module:
    """A network of torchvision, of timm, or what a function of yours makes.

    Args:
        name: ``"torchvision:resnet18"``, ``"timm:resnet50"``, ``"package.module:function"`` or ``"file.py:function"``.
        pretrained: with the weights that torchvision or timm download.
        classes: number of outputs; default: that of the library.

    Raises:
        ValueError: for a name of another form, one that is unknown, and for options that a function does not take.

    Example:
        >>> network("torch.nn:Identity")
        Identity()
    """
    where, colon, what = name.rpartition(":")
    if not colon or not where or not what:
        raise ValueError(
            f"--model {name!r} must be torchvision:NAME, timm:NAME, package.module:FUNCTION or file.py:FUNCTION"
        )
    options: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    if where == "torchvision":
        models = optional_import("torchvision.models")
        if what not in models.list_models():
            raise ValueError(f"torchvision has no network {what!r}; see torchvision.models.list_models()")
        return models.get_model(what, weights="DEFAULT" if pretrained else None, **options)
    if where == "timm":
        timm = optional_import("timm")
        if not timm.is_model(what):
            raise ValueError(f"timm has no network {what!r}; see timm.list_models({what[:4] + '*'!r})")
        return timm.create_model(what, pretrained=pretrained, **options)
    if pretrained:
        raise ValueError(f"--pretrained is for torchvision: and timm:; {name} makes its network itself, give --weights")
    found = getattr(_module(where), what, None)
    if not callable(found):
        raise ValueError(f"{where} has no function {what!r}")
    model = found(**options)
    if not isinstance(model, nn.Module):
        raise ValueError(f"{name} gave a {type(model).__name__}, not a torch.nn.Module")
    return model


def _module(where: str) -> Any:
    if not where.endswith(".py"):
        try:
            return importlib.import_module(where)
        except ImportError as error:
            raise ValueError(f"cannot import {where!r}: {error}; is its folder on PYTHONPATH?") from error
    path = Path(where)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.exists() or spec is None or spec.loader is None:
        raise ValueError(f"there is no file {where}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state dict, which may be an entry ``state_dict`` or ``model`` of a checkpoint; nothing is unpickled.

    Args:
        model: the network.
        path: ``.safetensors``, or a file of :func:`torch.save`.

    Raises:
        ValueError: if there is no state dict in the file, or it is of another network.
    """
    if path.suffix == ".safetensors":
        state = optional_import("safetensors.torch").load_file(path)
    else:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(f"{path} cannot be read as weights: {error}") from error
        for key in ("state_dict", "model"):
            state = state[key] if isinstance(state, dict) and isinstance(state.get(key), dict) else state
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} holds no state dict of tensors")
    bare = {name.removeprefix("module."): value for name, value in state.items()}  # of DataParallel
    try:
        model.load_state_dict(bare)
    except RuntimeError as error:
        raise ValueError(f"{path} is of another network than {type(model).__name__}: {error}") from error
