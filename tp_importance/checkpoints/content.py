"""What a checkpoint of a pruned network holds: its digests, and whether its parts agree with each other."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from .attributes import check_encoded, fingerprint

__all__ = [
    "check_content",
    "check_layers",
    "content_digests",
    "integers",
    "is_shadowing",
    "layer_problem",
    "other_kind",
    "tensor_sizes",
]

SECTIONS: dict[str, type] = {
    **{"format": str, "version": int, "torch": str},
    **{"state_dict": dict, "metadata": dict, "outside": dict},
    **{"parameters": dict, "buffers": dict, "requires_grad": dict, "modules": dict},
}
"""All entries of a checkpoint but ``digests``, which are made of these."""

_SIZES: dict[type[nn.Module], tuple[str, ...]] = {
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), ("in_channels", "out_channels", "kernel_size", "groups")),
    **dict.fromkeys(
        (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
        ("in_channels", "out_channels", "kernel_size", "groups"),
    ),
    nn.Linear: ("in_features", "out_features"),
    nn.Bilinear: ("in1_features", "in2_features", "out_features"),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm), ("num_features",)),
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), ("num_features",)),
    nn.GroupNorm: ("num_groups", "num_channels"),
    **dict.fromkeys((nn.LayerNorm, nn.RMSNorm), ("normalized_shape",)),
    nn.PReLU: ("num_parameters",),
    **dict.fromkeys((nn.Embedding, nn.EmbeddingBag), ("num_embeddings", "embedding_dim")),
    **dict.fromkeys((nn.RNN, nn.GRU), ("input_size", "hidden_size", "num_layers")),
    nn.LSTM: ("input_size", "hidden_size", "num_layers"),
    **dict.fromkeys((nn.RNNCell, nn.LSTMCell, nn.GRUCell), ("input_size", "hidden_size")),
    nn.MultiheadAttention: ("embed_dim", "num_heads", "kdim", "vdim"),
}
"""Per layer of ``torch.nn`` the arguments of its constructor, kept as attributes, that say what shapes it has."""

_OPTIONS: dict[type[nn.Module], tuple[str, ...]] = {nn.RNNBase: ("bias", "bidirectional")}
_MORE: dict[type[nn.Module], dict[str, Any]] = {
    nn.modules.batchnorm._NormBase: {"affine": True, "track_running_stats": True},
    nn.MultiheadAttention: {"add_bias_kv": True},
}
_PARTIAL = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.MultiheadAttention)
"""Layers that also work without some of their tensors."""
_STEPS = {"kernel_size": 1, "stride": 1, "dilation": 1, "padding": 0, "output_padding": 0}
"""Attributes of a convolution with a number per spatial dimension, and the least that it may be."""
_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


def integers(value: Any) -> Any:
    """``value`` if it is an integer or a tuple or list of them, as builtin types, else ``None``.

    Example:
        >>> integers(torch.Size([3, 4])), integers([1, "a"]), integers(True)
        ((3, 4), None, True)
    """
    if isinstance(value, Integral):
        return value if isinstance(value, bool) else int(value)
    if isinstance(value, (tuple, list)):
        items = [integers(item) for item in value]
        return None if None in items else items if isinstance(value, list) else tuple(items)
    return None


def content_digests(content: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of every entry of a checkpoint, by ``section/name``: of type, shape, strides and bits of every value.

    So the error can name what was changed. Whoever changes a file on purpose can compute them again: they are no
    signature.

    Args:
        content: the sections; ``digests`` is left out.

    Returns:
        The digests as hexadecimal text.

    Raises:
        ValueError: if something is neither a tensor nor a plain value; names it.

    Example:
        >>> a = content_digests({"version": 1, "outside": {"x": torch.ones(2)}})
        >>> b = content_digests({"version": 1, "outside": {"x": torch.ones(2).half()}})
        >>> list(a), [name for name in a if a[name] != b[name]]
        (['version', 'outside/x'], ['outside/x'])
    """
    found: dict[str, str] = {}
    for section, value in content.items():
        if section == "digests":
            continue
        items = {f"{section}/{name}": v for name, v in value.items()} if type(value) is dict else {section: value}
        for name, item in items.items():
            try:
                found[name] = fingerprint(item)
            except Exception as error:
                raise ValueError(f"{name} cannot be kept in a checkpoint: {error}") from error
    return found


def check_content(content: Mapping[str, Any], digests: Mapping[str, str]) -> None:
    """Check that the entries of a checkpoint are there, of the right types, and agree with each other.

    Args:
        content: the sections of a checkpoint.
        digests: :func:`content_digests` of it, true ones.

    Raises:
        ValueError: for the first that does not; names it.
    """
    for section, kind in SECTIONS.items():
        if section not in content:
            raise ValueError(f"it has no entry {section!r}")
        if type(content[section]) is not kind:
            raise ValueError(f"{section} is of type {type(content[section]).__name__}, not {kind.__name__}")
        for name in content[section] if kind is dict else ():
            if type(name) is not str:
                raise ValueError(f"{section} has the key {name!r}, which is no text")
    unknown = [name for name in content if name not in SECTIONS and name != "digests"]
    if unknown:
        raise ValueError(f"it has an unknown entry {unknown[0]!r}")
    _check_modules(content["modules"], digests)
    _check_tensors(content, digests)
    same = {name: entry["same_as"] for name, entry in content["modules"].items()}
    for what, firsts in (("layers", same), ("tensors", content["parameters"]), ("tensors", content["buffers"])):
        members = _members(firsts)
        for name, first in same.items():
            if members.get(name) != members.get(first):
                raise ValueError(f"layer {name!r} is the same as {first!r} but has other {what}")


def _check_modules(modules: Mapping[str, Any], digests: Mapping[str, str]) -> None:
    if "" not in modules:
        raise ValueError("modules has no entry '' for the network itself")
    for name, entry in modules.items():
        if type(entry) is not dict or set(entry) != {"class", "same_as", "config", "other"}:
            raise ValueError(f"the entry of layer {name!r} must have class, same_as, config and other, not {entry!r}")
        if type(entry["class"]) is not str or type(entry["config"]) is not dict or type(entry["other"]) is not dict:
            raise ValueError(f"layer {name!r} must have a text as class and dicts as config and other, not {entry!r}")
        if name.rpartition(".")[0] not in modules:
            raise ValueError(f"layer {name!r} is in no layer of the file")
        _check_first(f"layer {name!r}", entry["same_as"], {n: m.get("same_as") for n, m in _dicts(modules)})
        if digests[f"modules/{name}"] != digests[f"modules/{entry['same_as']}"]:
            raise ValueError(f"layer {name!r} is the same as {entry['same_as']!r} but has another class or config")
        for key, value in entry["config"].items():
            if type(key) is not str:
                raise ValueError(f"layer {name!r} has the key {key!r} in its config, which is no text")
            try:
                check_encoded(value)
            except ValueError as error:
                raise ValueError(f"layer {name!r} has {key!r} in its config: {error}") from error
        if any(type(text) is not str for item in entry["other"].items() for text in item):
            raise ValueError(f"layer {name!r} must have texts in other, not {entry['other']!r}")


def _members(firsts: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """What is directly in each layer: first name of the same object, by the last part of the name."""
    found: dict[str, dict[str, str]] = {}
    for name, first in firsts.items():
        owner, _, leaf = name.rpartition(".")
        if name:
            found.setdefault(owner, {})[leaf] = first
    return found


def _dicts(items: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(name, item) for name, item in items.items() if type(item) is dict]


def _check_first(what: str, first: Any, firsts: Mapping[str, Any]) -> None:
    if type(first) is not str or firsts.get(first) != first:
        raise ValueError(f"{what} is said to be the same as {first!r}, which is not the first of its name in the file")


def _check_tensors(content: Mapping[str, Any], digests: Mapping[str, str]) -> None:
    values = {**content["outside"], **content["state_dict"]}
    digest = {n: digests[f"{s}/{n}"] for s in ("outside", "state_dict") for n in content[s]}
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name!r} must be a tensor, not a {type(value).__name__}")
    parameters, buffers, flags = (content[key] for key in ("parameters", "buffers", "requires_grad"))
    for kind, firsts in (("parameter", parameters), ("buffer", buffers)):
        for name, first in firsts.items():
            if name not in values or (kind == "buffer" and name in parameters):
                raise ValueError(f"{kind} {name!r} has no tensor of its own in the file")
            if name.rpartition(".")[0] not in content["modules"]:
                raise ValueError(f"{kind} {name!r} is of no layer in the file")
            _check_first(f"{kind} {name!r}", first, firsts)
            if digest[name] != digest[first]:
                raise ValueError(f"{kind} {name!r} is tied to {first!r} but has other values")
    odd = set(flags) ^ set(parameters) | (set(content["outside"]) - set(parameters) - set(buffers))
    if odd:
        raise ValueError(f"{min(odd)!r} is not in all of parameters, requires_grad and the tensors")
    for name, flag in flags.items():
        value = values[name]
        if type(flag) is not bool or (flag and not (value.is_floating_point() or value.is_complex())):
            raise ValueError(f"requires_grad={flag!r} is not possible for {name!r} of dtype {value.dtype}")
    for name, entry in content["metadata"].items():
        if type(entry) is not dict:
            raise ValueError(f"the metadata of {name!r} must be a dict, not {entry!r}")


def is_shadowing(module: nn.Module, key: str, value: Any = None) -> bool:
    """Whether an attribute of an instance would hide something that is not its like: a method, a property, a tensor.

    Args:
        module: the instance.
        key: name of the attribute.
        value: what it would be; a tensor that is not registered may take the place of another.

    Example:
        >>> [key for key in ("in_features", "user_width", "forward", "train", "weight") if is_shadowing(nn.ReLU(), key)]
        ['forward', 'train']
        >>> is_shadowing(nn.Linear(1, 1), "weight")
        True
    """
    own = vars(module)
    if key.startswith("_") or key == "training" or any(key in own[r] for r in ("_parameters", "_buffers", "_modules")):
        return True
    if key in own:  # a user's attribute that hides a method itself is the user's own matter
        return callable(own[key]) or (isinstance(own[key], Tensor) and not isinstance(value, Tensor))
    inherited = inspect.getattr_static(type(module), key, None)
    return callable(inherited) or hasattr(inherited, "__get__") or hasattr(nn.Module, key)


def check_layers(model: nn.Module, *, stale: bool = False) -> None:
    """Check that the layers of ``torch.nn`` in ``model`` are what their attributes say.

    Args:
        model: the network.
        stale: let attributes pass that :func:`tensor_sizes` knows better.

    Raises:
        ValueError: if tensors of a layer are missing or of other shapes, its attributes contradict each other, or it
            has values that no layer of its kind can have, such as a negative variance; names the layer and the remedy.

    Example:
        >>> check_layers(net := nn.Sequential(nn.Linear(3, 4)))
        >>> net[0].in_features = 2
        >>> check_layers(net)
        Traceback (most recent call last):
        ValueError: layer '0' (Linear): its weight has shape (4, 3), but in_features=2, out_features=4 make it (4, 2); \
set these attributes to what the tensors are
    """
    for name, module in model.named_modules():
        problem = layer_problem(module, stale=stale)
        if problem:
            problem += "; set these attributes to what the tensors are"
        problem = problem or _value_problem(module)
        if problem:
            raise ValueError(f"layer {name!r} ({type(module).__name__}): {problem}")


def tensor_sizes(module: nn.Module) -> dict[str, Any]:
    """What the sizes of a layer of ``torch.nn`` are by its tensors, where its code does not ask its attributes.

    People who slice weights often leave such attributes as they were, and the layer runs nevertheless.

    Example:
        >>> layer = nn.Conv2d(4, 6, 3, groups=2)
        >>> layer.in_channels = 100
        >>> tensor_sizes(layer)
        {'in_channels': 4, 'out_channels': 6, 'kernel_size': (3, 3)}
    """
    base, weight = _layer_kind(module), module._parameters.get("weight")
    if base is None or not (isinstance(weight, Tensor) or issubclass(base, nn.modules.batchnorm._NormBase)):
        return {}
    if issubclass(base, nn.modules.batchnorm._NormBase):
        known = [t for t in (weight, module._buffers.get("running_mean")) if t is not None]
        return {"num_features": known[0].numel()} if known else {}
    assert weight is not None
    shape = tuple(weight.shape)
    if base in (nn.Embedding, nn.EmbeddingBag):
        return dict(zip(_SIZES[base], shape, strict=False))
    if base is nn.Linear:
        return dict(zip(("out_features", "in_features"), shape, strict=False))
    if base is nn.Bilinear:
        return dict(zip(("out_features", "in1_features", "in2_features"), shape, strict=False))
    if base in (nn.PReLU, nn.GroupNorm):
        return {_SIZES[base][-1]: weight.numel()}
    if (
        issubclass(base, nn.modules.conv._ConvNd)
        and weight.dim() > 2
        and type(groups := integers(module.groups)) is int
    ):
        first, second = shape[0], shape[1] * groups
        inputs, outputs = (first, second) if module.transposed else (second, first)
        return {"in_channels": inputs, "out_channels": outputs, "kernel_size": shape[2:]}
    return {}


def _layer_kind(module: nn.Module) -> type[nn.Module] | None:
    """The layer of ``torch.nn`` whose code ``module`` runs."""
    base = next((c for c in type(module).__mro__ if c in _SIZES), None)
    if base is None or "forward" in vars(module):
        return None
    if any(getattr(type(module), key, None) is not getattr(base, key, None) for key in ("forward", "_conv_forward")):
        return None
    return None if any(map(nn.parameter.is_lazy, module.parameters(recurse=False))) else base


def layer_problem(module: nn.Module, *, stale: bool = False) -> str | None:
    """How a layer of ``torch.nn`` contradicts itself, or ``None``; also ``None`` for layers with code of their own.

    Args:
        module: any module.
        stale: as for :func:`check_layers`.
    """
    base = _layer_kind(module)
    if base is None:
        return None
    sizes = {key: getattr(module, key, None) for key in _SIZES[base]}
    if stale:
        sizes |= tensor_sizes(module)
    options = {key: getattr(module, key) for cls, keys in _OPTIONS.items() if issubclass(base, cls) for key in keys}
    if base is nn.LSTM:
        options["proj_size"] = module.proj_size
    said = ", ".join(f"{key}={value!r}" for key, value in (sizes | options).items())
    for key, value in sizes.items():
        numbers = value if isinstance(value, (tuple, list)) else (value,)
        if integers(value) is None or any(type(n) is not int or n < 1 for n in map(integers, numbers)):
            return f"{key}={value!r} is not positive"
    problem = _step_problem(module, int(base.__name__[-2])) if issubclass(base, nn.modules.conv._ConvNd) else None
    if problem:
        return problem
    more = {k: v for cls, extra in _MORE.items() if issubclass(base, cls) for k, v in extra.items()}
    try:  # says what fits together, and what shapes it makes
        twin = base(**sizes, **options, **more, device="meta")
    except Exception as error:
        return f"{said} does not fit together ({error})"
    for registry in ("_parameters", "_buffers"):
        present, expected = getattr(module, registry), getattr(twin, registry)
        for name, like in expected.items():
            tensor = present.get(name)
            if like is None or name in vars(module) or name in getattr(module, "parametrizations", ()):
                continue  # not needed, or computed from other tensors
            if tensor is None:
                if isinstance(module, nn.RNNBase) or not ("bias" in name or isinstance(module, _PARTIAL)):
                    return f"its {name} is missing"
            elif tensor.shape != like.shape:
                return f"its {name} has shape {tuple(tensor.shape)}, but {said} make it {tuple(like.shape)}"
            elif like.dtype == torch.long and tensor.dtype != torch.long:
                return f"its {name} is of dtype {tensor.dtype}, not {like.dtype}"
        if isinstance(module, nn.RNNBase) and set(present) - set(expected):
            return f"its {min(set(present) - set(expected))} is one too many, as {said}"
    return None


def _step_problem(module: nn.Module, dims: int) -> str | None:
    for key, least in _STEPS.items():
        value = getattr(module, key)
        if key == "padding" and value in ("same", "valid"):
            continue
        right = isinstance(value, (tuple, list)) and len(value) == dims
        if not right or any(type(n) is not int or n < least for n in map(integers, value)):
            return f"{key}={value!r} must be {dims} integers of at least {least}"
    return None


def _value_problem(module: nn.Module) -> str | None:
    """Which value no layer of ``torch.nn`` of this kind can have, with the remedy, or ``None``.

    Weights may be anything, also NaN: a network whose training went wrong is kept as it is.
    """
    base = _layer_kind(module)
    if base is None:
        return None
    if issubclass(base, nn.modules.conv._ConvNd):
        known = _PADDING_MODES[:1] if module.transposed else _PADDING_MODES
        if module.padding_mode not in known:
            return f"padding_mode={module.padding_mode!r} is unknown; set it to {' or '.join(map(repr, known))}"
    eps: Any = getattr(module, "eps", None)
    if hasattr(module, "eps") and not (eps is None and base is nn.RMSNorm):  # there it means the least of the dtype
        # Batch norm refuses 0 in training; the others run with it.
        least = "positive" if issubclass(base, nn.modules.batchnorm._BatchNorm) else "at least 0"
        number = isinstance(eps, (int, float)) and not isinstance(eps, bool) and math.isfinite(eps)
        if not number or eps < 0 or (eps == 0 and least == "positive"):
            return f"eps={eps!r} must be a finite number and {least}; set it to one such as 1e-05"
    var, mean = (module._buffers.get(key) for key in ("running_var", "running_mean"))
    if isinstance(var, Tensor) and isinstance(mean, Tensor) and var.is_floating_point() and not var.is_meta:
        # Where training went wrong, the means are not finite either, and such a network is kept. A variance alone
        # is no statistic of anything.
        wrong = (var < 0) | ~var.isfinite() & mean.isfinite()
        if wrong.any():
            at = int(wrong.nonzero()[0])
            return (
                f"its running_var is {var[at].item():g} in channel {at}, which is no variance; take new statistics "
                "(recalibrate_batchnorm), or call its reset_running_stats()"
            )
    return None


def other_kind(module: nn.Module, new: Tensor | None, current: Tensor | None) -> str | None:
    """How the tensor of a file is of another kind than the factory's, if ``module`` is a layer of ``torch.nn``.

    Such layers take their widths and precision from the file, but a complex or sparse weight needs other inputs or
    other code, which only a factory can have meant.

    Args:
        module: the layer.
        new: its tensor in the file.
        current: the one of the factory.

    Returns:
        Both kinds and the remedy, or ``None``.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> other_kind(layer, torch.ones(2, 2, dtype=torch.complex64), layer.weight)
        "complex64 and strided in the file but float32 and strided in the factory's model; give a factory that builds \
it so"
        >>> other_kind(layer, torch.ones(3, 2).half(), layer.weight)
    """
    if new is None or current is None or _layer_kind(module) is None:
        return None
    if new.layout == current.layout and new.is_complex() == current.is_complex():
        return None
    of_file, of_factory = (f"{t.dtype} and {t.layout}".replace("torch.", "") for t in (new, current))
    return f"{of_file} in the file but {of_factory} in the factory's model; give a factory that builds it so"
