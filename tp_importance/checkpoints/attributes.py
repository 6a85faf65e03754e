"""Attributes of modules as values that a checkpoint can hold, and back: numbers, text, containers, configurations."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import hashlib
import inspect
from collections.abc import Iterable, Mapping
from enum import Enum
from numbers import Integral
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = [
    "UnknownClassError",
    "check_encoded",
    "class_name",
    "decoded",
    "described",
    "encoded",
    "feed",
    "fingerprint",
    "module_attributes",
    "same_value",
]

_NAMESPACES = (SimpleNamespace, argparse.Namespace)
_SCALARS = (type(None), bool, int, float, str, torch.dtype)
LARGEST = 2**20
"""Entries of the largest tensor that is kept where it is no parameter or buffer: it may be a cached activation."""

_CONTENTS: dict[Any, type] = {"items": dict, "fields": dict, "members": list, "value": object}
"""What a record says besides its class: entries of a mapping, fields, members of a set, the value of an enum."""
_BUILTIN = {"builtins.dict": "items", "builtins.set": "members", "builtins.frozenset": "members"}


class UnknownClassError(ValueError):
    """A record names a class of which no object is known.

    Args:
        name: of the class.
    """

    def __init__(self, name: str) -> None:
        super().__init__(f"it holds a {name}, and no attribute of the factory's model does")
        self.name = name


def module_attributes(module: nn.Module) -> tuple[dict[str, Any], dict[str, str]]:
    """The public attributes of one module: those that can be saved, encoded, and descriptions of the others.

    Parameters, buffers and submodules are not among them, nor are what ``functools.cached_property`` has computed,
    ``training`` and names that begin with an underscore.

    Args:
        module: any module.

    Returns:
        :func:`encoded` values by name, and :func:`described` values by name.

    Example:
        >>> layer = nn.Softmax(dim=1)
        >>> layer.scale, layer.act = 0.5, torch.relu
        >>> module_attributes(layer)[0]
        {'dim': 1, 'scale': 0.5}
        >>> list(module_attributes(layer)[1])
        ['act']
    """
    plain: dict[str, Any] = {}
    other: dict[str, str] = {}
    for key, value in vars(module).items():
        computed = isinstance(inspect.getattr_static(type(module), key, None), functools.cached_property)
        if key.startswith("_") or key == "training" or computed:
            continue
        try:
            plain[key] = encoded(value)
        except Exception:  # also what the user's classes raise when they are asked for their fields
            other[key] = described(value)
    return plain, other


def encoded(value: Any, known: dict[str, Any] | None = None, _inside: tuple[int, ...] = ()) -> Any:
    """``value`` as a tree of builtin values, without loss but for the code of classes.

    ``None``, ``bool``, ``int``, ``float``, ``str``, ``torch.dtype`` and ``torch.Size`` stand for themselves, also
    those of NumPy, and small tensors without a gradient (anchors that a detector has computed, say); lists and tuples
    hold encoded values. Mappings, sets, named tuples, dataclasses, namespaces
    (``types.SimpleNamespace``, ``argparse.Namespace``) and enums become a *record*: a dict of the name of their
    ``class`` and of what is in them.

    Args:
        value: anything.
        known: is given an object of every class that a record names, by that name.

    Raises:
        TypeError: for anything else, or a value that contains itself; names the type.

    Example:
        >>> encoded((1, np.float64(0.5), torch.Size([3])))
        (1, 0.5, torch.Size([3]))
        >>> encoded({"heads": [2, 4]})
        {'class': 'builtins.dict', 'items': {'heads': [2, 4]}}
    """
    if isinstance(value, np.generic):
        value = value.item()
    if type(value) in _SCALARS:
        return value
    if type(value) is Tensor and not value.requires_grad and value.layout == torch.strided and not value.is_meta:
        if value.numel() > LARGEST:
            raise TypeError(f"a tensor of {value.numel()} entries is too large to be an attribute")
        return value.clone()  # without the rest of its memory
    if id(value) in _inside:
        raise TypeError(f"a {type(value).__name__} contains itself")

    def inner(part: Any) -> Any:
        return encoded(part, known, (*_inside, id(value)))

    def record(kind: str, content: Any, base: type | None = None) -> dict[str, Any]:
        name = class_name(base or type(value))
        if known is not None and base is None:
            known.setdefault(name, value)
        return {"class": name, kind: content}

    if callable(value):
        raise TypeError(f"a {type(value).__name__} is code")
    if isinstance(value, Enum):
        return record("value", inner(value.value))
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, torch.Size):
        return torch.Size(value)
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return record("fields", {key: inner(part) for key, part in value._asdict().items()})
    if isinstance(value, (list, tuple)):
        parts = [inner(part) for part in value]
        return parts if isinstance(value, list) else tuple(parts)
    if isinstance(value, dict):
        entries = {_key(key): inner(part) for key, part in value.items()}
        return record("items", entries, dict if type(value) is dict else None)
    if isinstance(value, (set, frozenset)):
        base = set if isinstance(value, set) else frozenset
        return record("members", sorted(map(inner, value), key=repr), base)
    if dataclasses.is_dataclass(value):
        return record("fields", {f.name: inner(getattr(value, f.name)) for f in dataclasses.fields(value)})
    if isinstance(value, _NAMESPACES):
        return record("fields", {key: inner(part) for key, part in vars(value).items()})
    raise TypeError(f"a {type(value).__name__} is no number, text or container of them")


def decoded(value: Any, known: Mapping[str, Any]) -> Any:
    """What :func:`encoded` has made ``value`` of; no code of the file runs.

    Args:
        value: encoded.
        known: an object of every class that a record may name, builtin ones aside; it is not changed.

    Raises:
        UnknownClassError: for a class that is not known.
        ValueError: for one that is of another form than the record.

    Example:
        >>> decoded(encoded({"heads": {2, 4}}), {})
        {'heads': {2, 4}}
        >>> config = SimpleNamespace(width=4)
        >>> decoded({"class": "types.SimpleNamespace", "fields": {"width": 2}}, {"types.SimpleNamespace": config})
        namespace(width=2)
    """
    if type(value) in (list, tuple):
        return type(value)(decoded(part, known) for part in value)
    if type(value) is not dict:
        return value
    name, (kind, content) = value["class"], next(item for item in value.items() if item[0] != "class")
    if kind == "members":
        return {"builtins.set": set, "builtins.frozenset": frozenset}[name](decoded(part, known) for part in content)
    if name not in known and name != "builtins.dict":
        raise UnknownClassError(name)
    if kind == "value":
        found: Any = decoded(content, known)
    else:
        found = {key: decoded(part, known) for key, part in content.items()}
    if name == "builtins.dict":
        return found
    like = known[name]
    if kind == "value" and isinstance(like, Enum):
        return type(like)(found)
    if kind == "items" and isinstance(like, dict):
        mapping = copy.copy(like)
        mapping.clear()
        mapping.update(found)
        return mapping
    if kind == "fields" and isinstance(like, _NAMESPACES) and all(key.isidentifier() for key in found):
        return type(like)(**found)
    if kind == "fields" and isinstance(like, tuple) and set(found) == set(getattr(like, "_fields", ())):
        return type(like)(**found)
    if kind == "fields" and dataclasses.is_dataclass(like) and set(found) == {f.name for f in dataclasses.fields(like)}:
        made = copy.copy(like)
        for key, part in found.items():
            object.__setattr__(made, key, part)  # frozen ones, too; nothing of the class runs
        return made
    raise ValueError(f"it holds a {name} of {kind} {content!r}, which the {name} of the factory's model has not")


def check_encoded(value: Any) -> None:
    """Check that a value of a file is one that :func:`encoded` makes.

    Raises:
        ValueError: if it is not.
    """
    if type(value) in _SCALARS or type(value) in (torch.Size, Tensor):
        return
    parts = value if type(value) in (list, tuple) else _parts(value)
    for part in parts:
        check_encoded(part)


def _parts(value: Any) -> Iterable[Any]:
    """The encoded values in a record.

    Raises:
        ValueError: if ``value`` is no record.
    """
    found: list[Any] = [item for item in value.items() if item[0] != "class"] if type(value) is dict else []
    if len(found) != 1 or found[0][0] not in _CONTENTS or type(value.get("class")) is not str:
        raise ValueError(f"{value!r} is no number, text, list, tuple or record of a class")
    kind, content = found[0]
    name, builtin = value["class"], _BUILTIN.get(value["class"], kind)
    odd = kind != builtin or (kind == "members" and name not in _BUILTIN)
    if odd or not issubclass(type(content), _CONTENTS[kind]):
        raise ValueError(f"{value!r} is no record of a {name}")
    if kind == "fields" and any(type(key) is not str for key in content):
        raise ValueError(f"{value!r} has a field whose name is no text")
    if kind == "value":
        return (content,)
    return content if kind == "members" else content.values()


def same_value(one: Any, other: Any) -> bool:
    """Whether two encoded values are the same: types, order of entries, and bits of numbers but NaN's.

    Example:
        >>> same_value(0.0, 0.0), same_value(0.0, -0.0), same_value(1, True), same_value([1], (1,))
        (True, False, False, False)
    """
    return fingerprint(one) == fingerprint(other)


def fingerprint(value: Any) -> str:
    """SHA-256 of what :func:`feed` takes of a value, as hexadecimal text."""
    digest = hashlib.sha256()
    feed(digest, value)
    return digest.hexdigest()


def feed(digest: Any, value: Any) -> None:
    """Give a digest the types, shapes and bits of tensors and encoded values.

    Lengths go before contents, so that no two values feed the same bytes.

    Args:
        digest: of ``hashlib``.
        value: the value.

    Raises:
        TypeError: if it is something else, or a tensor without values.
    """
    kind = type(value)
    if isinstance(value, Tensor):
        if value.is_meta:
            raise TypeError("it is on the meta device and has no values; materialise the network first")
        strides = value.stride() if value.layout == torch.strided else None
        feed(digest, ["tensor", str(value.dtype), str(value.layout), *value.shape, strides])
        dense = value.detach()
        dense = dense.dequantize() if dense.is_quantized else dense if strides is not None else dense.to_dense()
        flat = dense.resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy())
    elif kind in (list, tuple, dict, torch.Size):
        digest.update(f"{kind.__name__} {len(value)};".encode())
        for item in value.items() if kind is dict else value:
            feed(digest, item)
    elif kind in _SCALARS:
        text = repr(value).encode("utf-8", "surrogatepass")
        digest.update(f"{kind.__name__} {len(text)}:".encode() + text)
    else:
        raise TypeError(f"it is of type {kind.__name__}; only tensors, numbers, text, lists, tuples and dicts are kept")


def described(value: Any) -> str:
    """Name of a function or class, or of the class of anything else.

    Example:
        >>> described(nn.ReLU), described([torch.ones(1)])
        ('torch.nn.modules.activation.ReLU', 'builtins.list')
    """
    named = value if inspect.isroutine(value) or isinstance(value, type) else type(value)
    return f"{getattr(named, '__module__', None) or 'builtins'}.{named.__qualname__}"


def _key(key: Any) -> Any:
    """A key of a mapping, if it is a plain value.

    Raises:
        TypeError: if it is not.
    """
    if type(key) is tuple:
        return tuple(map(_key, key))
    key = key.item() if isinstance(key, np.generic) else key
    if type(key) not in _SCALARS:
        raise TypeError(f"a key of type {type(key).__name__} is no number or text")
    return key


def class_name(cls: type) -> str:
    """Where a class is, and its name.

    Example:
        >>> class_name(nn.ReLU)
        'torch.nn.modules.activation.ReLU'
    """
    return f"{cls.__module__}.{cls.__qualname__}"
