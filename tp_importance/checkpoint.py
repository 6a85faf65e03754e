"""Save a pruned network without pickling its code, and rebuild it from its class."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from itertools import chain
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .batches import reference_tensor
from .files import written_at_once

__all__ = ["load_pruned", "register_rebuilt", "save_pruned"]

FORMAT = "tp_importance.pruned"
VERSION = 1

_PLAIN = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.Identity, nn.ReLU),
)
REBUILT: dict[str, type[nn.Module]] = {f"{cls.__module__}.{cls.__qualname__}": cls for cls in _PLAIN}
"""Modules that are built from the file where the factory has another class; the constructor says all about them."""


def register_rebuilt(cls: type[nn.Module]) -> None:
    """Let :func:`load_pruned` build ``cls`` where the factory has another class.

    Args:
        cls: a module that is built from the integers, floats and strings among its public attributes that its
            constructor takes; parameters and buffers come from the file.

    Raises:
        ValueError: if another class of that name is registered.
    """
    name = f"{cls.__module__}.{cls.__qualname__}"
    if REBUILT.setdefault(name, cls) is not cls:
        raise ValueError(f"{name} is registered already")


def save_pruned(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a pruned network to ``path`` for :func:`load_pruned`.

    The file is one dict of tensors and plain values, readable with ``torch.load(path, weights_only=True)``:
    ``format``, ``version``, ``torch`` (version that wrote it), ``state_dict``, ``outside`` (parameters and buffers
    that are not in the state dict, such as non-persistent buffers), ``parameters`` and ``buffers`` (name → first name
    of the same tensor, so that tied ones stay tied), ``requires_grad`` (by parameter) and ``modules``: by name the
    class, the first name of the same module, and the configuration. That is every public attribute that is an
    ``int`` or a tuple or list of them (widths, groups, heads, the user's own such as split sizes); for the layers
    in ``REBUILT`` also the other arguments of their constructors. Other attributes come from the factory on loading.

    The file appears under its name only when it is complete; an old one is replaced in one step, or kept.

    Args:
        model: the network; not wrapped by ``DataParallel`` or ``torch.compile``.
        path: the file to write; its folder exists.

    Raises:
        TypeError: if ``model`` or ``path`` are of another type.
        ValueError: if ``path`` is or lies in no proper folder, or a module has extra state that is not a tensor.
        OSError: if writing fails.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    target = Path(os.path.realpath(_checked_path(path)))
    if target.is_dir() or not target.parent.is_dir():
        raise ValueError(f"cannot write {target}: it must be a file name in a folder that exists; create the folder")
    state = model.state_dict()
    for key, value in state.items():
        if not isinstance(value, Tensor):
            owner = key.rpartition(".")[0]
            raise ValueError(f"layer {owner!r} has extra state of type {type(value).__name__}; return a tensor from it")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    modules = dict(model.named_modules(remove_duplicate=False))
    first = _first_names(modules)
    content = {
        "format": FORMAT,
        "version": VERSION,
        "torch": str(torch.__version__),
        "state_dict": state,
        "outside": {n: t.detach() for n, t in (parameters | buffers).items() if n not in state},
        "parameters": _first_names(parameters),
        "buffers": _first_names(buffers),
        "requires_grad": {name: p.requires_grad for name, p in parameters.items()},
        "modules": {
            n: {"class": _class_name(m), "same_as": first[n], "config": _config(m)} for n, m in modules.items()
        },
    }
    with written_at_once(target) as file:
        torch.save(content, file)


def load_pruned(factory: Callable[[], nn.Module], path: str | os.PathLike[str]) -> nn.Module:
    """Rebuild the network in ``path``.

    ``factory()`` gives the code; shapes, dtypes, widths and values come from the file, so the unpruned class will do.
    Where a module of the factory is of another class than the saved one and the saved one is a plain layer (those in
    ``REBUILT``), it is built anew: an ``nn.Identity`` in place of a normalisation, say. A layer of ``torch.nn`` may
    gain or lose its bias.

    Args:
        factory: class or function without arguments that builds the network, pruned or not, of any width.
        path: a file written by :func:`save_pruned`.

    Returns:
        The network in **eval mode**, on the device of what ``factory`` built; parameters, buffers, dtypes, ties and
        ``requires_grad`` are bit for bit those saved.

    Raises:
        TypeError: if ``factory`` is not callable, is a module itself or builds none; if ``path`` is no path.
        ValueError: if the file cannot be read as such a checkpoint, or the network of ``factory`` has other layers.

    Example:
        >>> import tempfile, torch_pruning as tp
        >>> def net():
        ...     return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> model, x = net(), torch.randn(1, 3, 8, 8)
        >>> group = tp.DependencyGraph().build_dependency(model, x).get_pruning_group(
        ...     model[0], tp.prune_conv_out_channels, idxs=[0, 5])
        >>> group.prune()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_pruned(model, f"{folder}/pruned.pt")
        ...     again = load_pruned(net, f"{folder}/pruned.pt")
        >>> again[0], torch.equal(again(x), model(x))
        (Conv2d(3, 6, kernel_size=(3, 3), stride=(1, 1)), True)
    """
    if isinstance(factory, nn.Module) or not callable(factory):
        raise TypeError(f"factory must be a class or function that builds the model, not a {type(factory).__name__}")
    model = factory()
    if not isinstance(model, nn.Module):
        raise TypeError(f"factory built a {type(model).__name__}, not a torch.nn.Module")
    like = reference_tensor(model)
    content = _read(path, "cpu" if like is None or like.is_meta else like.device)
    _match_modules(model, content)
    _set_tensors(model, content)
    model.load_state_dict(content["state_dict"], strict=True)
    return model.eval()


def _checked_path(path: Any) -> str:
    if not isinstance(path, (str, os.PathLike)) or isinstance(os.fspath(path), bytes):
        raise TypeError(f"path must be a str or os.PathLike, not {type(path).__name__}")
    return str(os.fspath(path))


def _read(path: Any, device: Any) -> dict[str, Any]:
    name = _checked_path(path)
    remedy = "give a file written by save_pruned"
    if not os.path.isfile(name):
        raise ValueError(f"{name} is not a file; {remedy}")
    try:
        content = torch.load(name, map_location=device, weights_only=True)
    except Exception as error:
        raise ValueError(f"{name} cannot be read ({type(error).__name__}); it may be damaged: {remedy}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{name} is not a checkpoint of a pruned network (a plain state_dict, perhaps); {remedy}")
    if content.get("version") != VERSION:
        raise ValueError(f"{name} has format version {content.get('version')}, not {VERSION}; update tp-importance")
    return content


def _first_names(items: dict[str, Any]) -> dict[str, str]:
    """For every name the first name of the same object."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(item), name) for name, item in items.items()}


def _class_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _plain(value: Any) -> Any:
    """``value`` if it is an integer or a tuple or list of them, as builtin types, else ``None``."""
    if isinstance(value, Integral):
        return value if isinstance(value, bool) else int(value)
    if isinstance(value, (tuple, list)):
        items = [_plain(item) for item in value]
        return None if None in items else items if isinstance(value, list) else tuple(items)
    return None


def _config(module: nn.Module) -> dict[str, Any]:
    public = {k: v for k, v in vars(module).items() if not k.startswith("_") and k != "training"}
    config = {k: _plain(v) for k, v in public.items() if _plain(v) is not None}
    cls = REBUILT.get(_class_name(module))
    if cls is not None:  # such as eps, momentum, padding_mode
        arguments = inspect.signature(cls).parameters
        config |= {k: v for k, v in public.items() if k in arguments and type(v) in (float, str, type(None))}
    return config


def _match_modules(model: nn.Module, content: dict[str, Any]) -> None:
    """Give ``model`` the modules and the configuration of the file."""
    saved = content["modules"]
    remedy = "load with the factory that built the network before it was pruned"
    present = dict(model.named_modules(remove_duplicate=False))
    aliases = _first_names(present)
    for name, entry in saved.items():
        cls, first = entry["class"], entry["same_as"]
        if name not in present:
            raise ValueError(f"layer {name!r} ({cls}) is in the file but not in the factory's model; {remedy}")
        same_class = cls.rpartition(".")[2] == type(present[name]).__name__
        if same_class and aliases[name] == first:
            continue
        if cls not in REBUILT or not name:
            found = f"{_class_name(present[name])} (the module {aliases[name]!r}) in the factory's model"
            raise ValueError(f"layer {name!r} is a {cls} (the module {first!r}) in the file but a {found}; {remedy}")
        parent, _, leaf = name.rpartition(".")
        setattr(present[parent], leaf, _built(entry) if first == name else present[first])
        present = dict(model.named_modules(remove_duplicate=False))
        aliases = _first_names(present)
    for name, module in present.items():
        if name not in saved:
            raise ValueError(
                f"layer {name!r} ({_class_name(module)}) of the factory's model is not in the file; {remedy}"
            )
        for key, value in saved[name]["config"].items():
            if value is None or _plain(vars(module).get(key)) != value:
                module.__dict__[key] = value


def _built(entry: dict[str, Any]) -> nn.Module:
    cls = REBUILT[entry["class"]]
    return cls(**{k: v for k, v in entry["config"].items() if k in inspect.signature(cls).parameters})


def _set_tensors(model: nn.Module, content: dict[str, Any]) -> None:
    """Put the parameters and buffers of the file into ``model``, tied as they were."""
    remedy = "use the factory that built the network"
    values = {**content["outside"], **content["state_dict"]}
    flags = content["requires_grad"]
    parameters = {n: nn.Parameter(values[n], flags[n]) for n, first in content["parameters"].items() if n == first}
    tensors = {
        "_parameters": {name: parameters[first] for name, first in content["parameters"].items()},
        "_buffers": {name: values[first] for name, first in content["buffers"].items()},
    }
    for layer, module in model.named_modules(remove_duplicate=False):
        for registry in ("_parameters", "_buffers"):
            for leaf, current in list(getattr(module, registry).items()):
                name = f"{layer}.{leaf}" if layer else leaf
                new = tensors[registry].pop(name, None)
                if new is None and current is not None and not _class_name(module).startswith("torch.nn."):
                    raise ValueError(f"{name!r} of the factory's model is not in the file; {remedy}")
                if new is not current:
                    setattr(module, leaf, new)
    for name in chain(*tensors.values()):
        raise ValueError(f"{name!r} is in the file but not in the factory's model; {remedy}")
