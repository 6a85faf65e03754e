"""Save a pruned network without pickling its code, and rebuild it from its class."""

from __future__ import annotations

import functools
import inspect
import os
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.arguments import checked_model
from ..core.devices import reference_tensor
from ..core.files import check_archive, written_at_once
from .attribute_loading import AttributeLoader
from .attributes import class_name, module_attributes
from .content import check_content, check_layers, content_digests, other_kind, tensor_sizes

__all__ = ["load_pruned", "register_rebuilt", "save_pruned"]

FORMAT = "tp_importance.pruned"
VERSION = 3

_PLAIN = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.Identity, nn.ReLU),
)
REBUILT: dict[str, type[nn.Module]] = {f"{cls.__module__}.{cls.__qualname__}": cls for cls in _PLAIN}
"""Modules that are built from the file where the factory has another class; the constructor says all about them."""
_CONVERTED = {
    "tp_importance.methods.resconv.block.ResConv2d": "call fuse(model) first and save again, or load with a factory "
    "that calls convert_to_resconv on the network"
}
"""Layers that a conversion of ours puts in and no plain factory builds, with what to do about them. By name, because
their module imports this one."""


def register_rebuilt(cls: type[nn.Module]) -> None:
    """Let :func:`load_pruned` build ``cls`` where the factory has another class.

    Args:
        cls: a module that is built from those of its public attributes that its constructor takes; parameters and
            buffers come from the file.

    Raises:
        ValueError: if another class of that name is registered.
    """
    name = f"{cls.__module__}.{cls.__qualname__}"
    if REBUILT.setdefault(name, cls) is not cls:
        raise ValueError(f"{name} is registered already")


def save_pruned(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a pruned network to ``path`` for :func:`load_pruned`.

    The file is one dict of tensors and plain values, readable with ``torch.load(path, weights_only=True)``:
    ``format``, ``version``, ``torch`` (version that wrote it), ``state_dict``, ``metadata`` (of the state dict: the
    versions of its modules), ``outside`` (parameters and buffers that are not in the state dict, such as
    non-persistent buffers), ``parameters`` and ``buffers`` (name → first name of the same tensor, so that tied ones
    stay tied), ``requires_grad`` (by parameter) and ``modules``: by name the class, the first name of the same
    module, the configuration and what else there is. The configuration is every public attribute that is a plain
    value, whoever has set it: ``None``, numbers, text, dtypes, ``torch.Size``, and lists, tuples, sets, dicts,
    dataclasses, named tuples, namespaces and enums of them, nested as one likes. Widths of layers of ``torch.nn`` are
    those of their tensors, even if somebody sliced a weight and left ``in_features`` as it was. Other attributes,
    functions or arrays say, cannot be kept; ``other`` has their names and kinds. They come from the factory on loading,
    which warns if another kind of thing is there. So do private attributes (``_name``) and what
    ``functools.cached_property`` has computed. ``digests`` has the SHA-256 of every entry
    (:func:`~tp_importance.checkpoints.content.content_digests`).

    The file appears under its name only when it is complete; an old one is replaced in one step, or kept. What a
    killed save left behind is removed by the next save to the same name.

    Args:
        model: the network; not wrapped by ``DataParallel`` or ``torch.compile``.
        path: the file to write; its folder exists.

    Warns:
        UserWarning: if layers of an unfused :class:`~tp_importance.methods.resconv.ResConv2d` kind are saved, which
            only a factory can load that converts its network as well.

    Raises:
        TypeError: if ``model`` or ``path`` are of another type, or the model is compiled.
        ValueError: if ``path`` is or lies in no proper folder, a module has extra state that is not a tensor, a tensor
            has no values (meta device), or a layer of ``torch.nn`` contradicts itself and cannot run, such as seven
            groups of eight channels or a negative variance. Weights that are not finite are saved as they are.
        OSError: if writing fails.
    """
    checked_model(model)
    target = Path(os.path.realpath(_checked_path(path)))
    if target.is_dir() or not target.parent.is_dir():
        raise ValueError(f"cannot write {target}: it must be a file name in a folder that exists; create the folder")
    state = model.state_dict()
    for key, value in state.items():
        if not isinstance(value, Tensor):
            owner = key.rpartition(".")[0]
            raise ValueError(f"layer {owner!r} has extra state of type {type(value).__name__}; return a tensor from it")
    check_layers(model, stale=True)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    modules = dict(model.named_modules(remove_duplicate=False))
    first = _first_names(modules)
    content: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "torch": str(torch.__version__),
        "state_dict": dict(state),
        "metadata": {n: dict(m) for n, m in getattr(state, "_metadata", {}).items()},
        "outside": {n: t.detach() for n, t in (parameters | buffers).items() if n not in state},
        "parameters": _first_names(parameters),
        "buffers": _first_names(buffers),
        "requires_grad": {name: p.requires_grad for name, p in parameters.items()},
        "modules": {n: {"same_as": first[n], **_described(m)} for n, m in modules.items()},
    }
    content["digests"] = content_digests(content)
    check_content(content, content["digests"])
    with written_at_once(target) as file, checksums_written():
        torch.save(content, file)
    for cls, advice in _CONVERTED.items():  # only now: where warnings are errors, the file is there nevertheless
        names = [n for n, entry in content["modules"].items() if entry["class"] == cls]
        if names:
            warnings.warn(
                f"{target} holds layers of class {cls.rpartition('.')[2]} ({', '.join(names)}), which load_pruned does "
                f"not accept from the factory of the plain network; {advice}",
                stacklevel=2,
            )


@torch.inference_mode(False)  # it makes parameters
def load_pruned(factory: Callable[[], nn.Module], path: str | os.PathLike[str]) -> nn.Module:
    """Rebuild the network in ``path``.

    ``factory()`` gives the code; shapes, dtypes, widths and values come from the file, so the unpruned class will do.
    Where a module of the factory is of another class than the saved one and the saved one is a plain layer (those in
    ``REBUILT``), it is built anew: an ``nn.Identity`` in place of a normalisation, say. A layer of ``torch.nn`` may
    gain or lose its bias; its tensors must be complex, or sparse, where those of the factory are, and nowhere else.
    Attributes that are plain values are those of the file (see :func:`save_pruned`); where the factory has the same,
    its own object stays. The file has the values of dataclasses, enums and the like, not their classes: these are
    those that occur among the attributes of the factory's network.

    Nothing is believed of the file. Two checks find damage, such as one flipped bit: every member of the archive is
    compared with its CRC-32 before it is read, and every entry with its SHA-256 afterwards. They also find a change by
    hand, unless the digests were computed again: they are no signature, so load files of people you trust. Then the
    entries must agree with each other, and each layer of ``torch.nn`` must agree with its own tensors. Whether one
    layer fits the next is not known without running the network: for a file with new digests, the first forward pass
    says it.

    Args:
        factory: class or function without arguments that builds the network, pruned or not, of any width.
        path: a file written by :func:`save_pruned`.

    Returns:
        The network in **eval mode**, on the device of what ``factory`` built; parameters, buffers, dtypes, ties and
        ``requires_grad`` are bit for bit those saved.

    Warns:
        UserWarning: if the factory's network has an attribute or a method where the file has something that cannot be
            loaded: another function, or a class that no attribute of the factory's has.

    Raises:
        TypeError: if ``factory`` is not callable, needs arguments, raises a ``TypeError``, is a module itself or builds
            none; if ``path`` is no path.
        ValueError: if the file cannot be read as such a checkpoint, is damaged or was changed, contradicts itself, or
            the network of ``factory`` has other layers; names the file, and the entry or layer. Also if ``factory``
            raises anything but a ``TypeError``, which is then its cause.

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
    model = _called(factory)
    if not isinstance(model, nn.Module):
        raise TypeError(f"factory built a {type(model).__name__}, not a torch.nn.Module")
    like = reference_tensor(model)
    content = _read(path, "cpu" if like is None or like.is_meta else like.device)
    try:
        attributes = _match_modules(model, content)
        _set_tensors(model, content)
        state = OrderedDict(content["state_dict"])
        state._metadata = content["metadata"]  # type: ignore[attr-defined]
        model.load_state_dict(state, strict=True)
        check_layers(model)
    except Exception as error:  # modules of the user's are asked as well, which raise whatever they like
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise ValueError(f"{os.fspath(path)} does not fit the factory's model: {kind}{error}") from error
    attributes.warn(str(os.fspath(path)))
    return model.eval()


def _called(factory: Callable[[], Any]) -> Any:
    """What ``factory`` builds; what it raises instead becomes the cause of an error that names it."""
    try:
        return factory()
    except Exception as error:
        inner = factory.func if isinstance(factory, functools.partial) else factory
        name = getattr(inner, "__name__", type(inner).__name__)
        kind = "" if type(error) is TypeError else f"{type(error).__name__}: "
        remedy = "it must build the network when it is called without arguments, so mend what it raises"
        if _needs_arguments(factory):
            example = f"{name}(...)" if name.isidentifier() and hasattr(inner, "__name__") else "Net(...)"
            remedy = f"give a function without arguments, e.g. lambda: {example}"
        raised = TypeError if isinstance(error, TypeError) else ValueError
        raise raised(f"factory {name} could not build the network ({kind}{error}): {remedy}") from error


def _needs_arguments(factory: Callable[..., Any]) -> bool:
    try:
        inspect.signature(factory).bind()
    except TypeError:
        return True
    except ValueError:  # code in C may have no signature
        pass
    return False


@contextmanager
def checksums_written() -> Iterator[None]:
    """``torch.save`` writes CRC-32s, also where the user has turned that off."""
    old = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(old)


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
        with open(name, "rb") as file:  # once: what is checked is what is read
            check_archive(file)
            content = torch.load(file, map_location=device, weights_only=True, mmap=False)
    except Exception as error:
        raise ValueError(
            f"{name} cannot be read ({type(error).__name__}: {error}); it may be damaged: {remedy}"
        ) from error
    if type(content) is not dict or content.get("format") != FORMAT:
        raise ValueError(f"{name} is not a checkpoint of a pruned network (a plain state_dict, perhaps); {remedy}")
    version = content.get("version")
    if type(version) is not int or version != VERSION:
        older = type(version) is int and version < VERSION
        remedy = "it was written by an older tp-importance: save the network again" if older else "update tp-importance"
        raise ValueError(f"{name} has format version {version}, not {VERSION}; {remedy}")
    try:
        digests = content_digests(content)
        _compare(content.get("digests"), digests)
        check_content(content, digests)
    except Exception as error:
        raise ValueError(f"{name} is not as save_pruned wrote it: {error}; {remedy}") from error
    return content


def _compare(given: Any, found: dict[str, str]) -> None:
    """Raise ``ValueError`` if the digests in a file are not those of its entries."""
    if type(given) is not dict:
        raise ValueError(f"its entry 'digests' is a {type(given).__name__}, not a dict")
    odd = [n for n, digest in found.items() if type(given.get(n)) is not str or given[n] != digest]
    odd += [str(name) for name in given if name not in found]
    if odd:
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        raise ValueError(f"its entries {', '.join(odd[:3])}{more} were changed, added or taken away after it was saved")


def _first_names(items: dict[str, Any]) -> dict[str, str]:
    """For every name the first name of the same object."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(item), name) for name, item in items.items()}


_BAKED = "; where bake_weights or explicit_attention was called on the network, the factory must call it, too"


def _described(module: nn.Module) -> dict[str, Any]:
    config, other = module_attributes(module)
    config |= {k: v for k, v in tensor_sizes(module).items() if k in config}
    return {"class": class_name(type(module)), "config": config, "other": other}


def _match_modules(model: nn.Module, content: dict[str, Any]) -> AttributeLoader:
    """Give ``model`` the modules and the configuration of the file."""
    saved, attributes = content["modules"], AttributeLoader(model)
    usual = remedy = f"load with the factory that built the network before it was pruned{_BAKED}"
    present = dict(model.named_modules(remove_duplicate=False))
    aliases = _first_names(present)
    for name, entry in saved.items():
        cls, first = entry["class"], entry["same_as"]
        remedy = _CONVERTED.get(cls, usual)
        if name not in present:
            raise ValueError(f"layer {name!r} ({cls}) is in the file but not in the factory's model; {remedy}")
        same_class = cls.rpartition(".")[2] == type(present[name]).__name__
        if same_class and aliases[name] == first:
            continue
        if not name and not same_class:
            raise ValueError(f"the file holds a {cls}, the factory builds a {class_name(type(model))}; {remedy}")
        if cls not in REBUILT or not name:
            found = f"{class_name(type(present[name]))} (the module {aliases[name]!r}) in the factory's model"
            raise ValueError(f"layer {name!r} is a {cls} (the module {first!r}) in the file but a {found}; {remedy}")
        parent, _, leaf = name.rpartition(".")
        setattr(present[parent], leaf, _built(name, entry, attributes) if first == name else present[first])
        present = dict(model.named_modules(remove_duplicate=False))
        aliases = _first_names(present)
    remedy = usual
    for name, module in present.items():
        if name not in saved:
            raise ValueError(
                f"layer {name!r} ({class_name(type(module))}) of the factory's model is not in the file; {remedy}"
            )
        attributes.load(name, module, saved[name])
        if isinstance(module, nn.modules.conv._ConvNd):
            module._reversed_padding_repeated_twice = _padding(module)  # derived by the constructor
    return attributes


def _padding(conv: Any) -> list[int]:
    """What a convolution pads its input by, as ``F.pad`` takes it: last dimension first, before and behind."""
    if conv.padding == "same":
        totals = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return [part for total in reversed(totals) for part in (total // 2, total - total // 2)]
    sizes = [0] * len(conv.kernel_size) if conv.padding == "valid" else conv.padding
    return [size for size in reversed(sizes) for _ in range(2)]


def _built(name: str, entry: dict[str, Any], attributes: AttributeLoader) -> nn.Module:
    cls = REBUILT[entry["class"]]
    arguments = attributes.arguments(entry["config"], cls)
    # Without memory for tensors, which come from the file; other people's classes may hold some that do not.
    place = torch.device("meta") if cls in _PLAIN else nullcontext()
    try:
        with place:
            return cls(**arguments)
    except Exception as error:
        said = ", ".join(f"{k}={v!r}" for k, v in arguments.items())
        raise ValueError(f"layer {name!r} cannot be built as {cls.__name__}({said}): {error}") from error


def _set_tensors(model: nn.Module, content: dict[str, Any]) -> None:
    """Put the parameters and buffers of the file into ``model``, tied as they were."""
    remedy = f"use the factory that built the network{_BAKED}"
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
                problem = other_kind(module, new, current)
                if problem:
                    raise ValueError(f"layer {layer!r} ({type(module).__name__}): its {leaf} is {problem}")
                if new is None and current is not None and not class_name(type(module)).startswith("torch.nn."):
                    raise ValueError(f"{name!r} of the factory's model is not in the file; {remedy}")
                if new is not current:
                    setattr(module, leaf, new)
    for name in chain(*tensors.values()):
        raise ValueError(f"{name!r} is in the file but not in the factory's model; {remedy}")
