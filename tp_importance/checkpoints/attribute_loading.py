"""Give the modules of a factory's network the attributes of a checkpoint."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from torch import Tensor, nn

from ..core.processes import levels_up
from .attributes import UnknownClassError, class_name, decoded, described, encoded, fingerprint, same_value
from .content import is_shadowing

__all__ = ["AttributeLoader"]

_MISSING = object()
_NAMED = 3


class AttributeLoader:
    """Attributes of a file for the modules of one network, which the factory has built.

    Where the factory has the same value its own object stays, which other modules may share; modules that share one
    object go on to share what replaces it. Classes of values, dataclasses say, are those that occur among the
    attributes of the network.

    Args:
        model: the network, before it is changed.
    """

    def __init__(self, model: nn.Module) -> None:
        self._classes: dict[str, Any] = {}
        self._replaced: dict[tuple[int, str], tuple[Any, Any]] = {}
        self._left: dict[str, None] = {}
        for module in model.modules():
            for key, value in vars(module).items():
                if not key.startswith("_"):
                    with suppress(Exception):  # not plain, or a class of the user's that raises
                        encoded(value, self._classes)

    def arguments(self, config: Mapping[str, Any], cls: type[nn.Module]) -> dict[str, Any]:
        """What the constructor of ``cls`` takes of the configuration of a layer."""
        names = inspect.signature(cls).parameters
        return {key: decoded(value, self._classes) for key, value in config.items() if key in names}

    def load(self, name: str, module: nn.Module, entry: Mapping[str, Any]) -> None:
        """Give one module its attributes.

        Args:
            name: of the module.
            module: the module.
            entry: of the module in the file, as :mod:`tp_importance.checkpoints.content` wants it.

        Raises:
            ValueError: for an attribute that would hide something else, or a value that cannot be made; names it.
        """
        for key, value in entry["config"].items():
            if value is None and any(key in vars(module)[r] for r in ("_parameters", "_buffers", "_modules")):
                continue  # what is registered there, if anything, comes from the lists of tensors and layers
            if is_shadowing(module, key, value):
                raise ValueError(
                    f"layer {name!r} has {key}={value!r} in its config, which would hide {key!r} of "
                    f"{class_name(type(module))}; load with the factory that built the network before it was pruned, "
                    "or save it without that attribute"
                )
            self._set(name, module, key, value)
        for key, kind in entry["other"].items():
            found = described(vars(module)[key]) if key in vars(module) else "nothing"
            if found != kind:
                self._leave(name, module, key, kind)

    def _set(self, name: str, module: nn.Module, key: str, value: Any) -> None:
        current = vars(module).get(key, _MISSING)
        if current is not _MISSING:
            with suppress(Exception):  # not plain here
                if same_value(encoded(current), value):
                    return
        place = id(current), fingerprint(value)
        if current is _MISSING or place not in self._replaced:
            try:
                self._replaced[place] = current, decoded(value, self._classes)
            except UnknownClassError as error:
                self._leave(name, module, key, error.name)
                return
            except Exception as error:
                raise ValueError(
                    f"attribute {key!r} of layer {name!r} cannot be made ({error}); load with the factory that built "
                    "the network before it was pruned"
                ) from error
        made = self._replaced[place][1]
        module.__dict__[key] = made.to(current.device) if isinstance(current, Tensor) else made

    def _leave(self, name: str, module: nn.Module, key: str, kind: str) -> None:
        """Note an attribute that stays the factory's, if code of the factory's may ask for it."""
        if inspect.getattr_static(module, key, _MISSING) is not _MISSING:
            found = described(vars(module)[key]) if key in vars(module) else "that of its class"
            self._left[f"{key!r} of layer {name!r} was a {kind} and is {found}"] = None

    def warn(self, path: str) -> None:
        """Say which attributes stay as the factory made them although they were something else in the file."""
        left = list(self._left)
        if left:
            more = f", and {len(left) - _NAMED} more" if len(left) > _NAMED else ""
            warnings.warn(
                f"{path}: some attributes cannot be loaded and are those of the factory: {'; '.join(left[:_NAMED])}"
                f"{more}. Set them by hand, or use a factory that does",
                stacklevel=levels_up(),
            )
