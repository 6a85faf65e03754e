"""What a search for groups is given, checked before anything runs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from numbers import Integral
from typing import Any

from torch import nn

__all__ = ["check_ignored", "check_options"]

_PRUNING_FUNCTIONS = ("prune_out_channels", "prune_in_channels", "get_out_channels", "get_in_channels")


def check_options(
    model: nn.Module,
    *,
    ignored_layers: Any = None,
    num_heads: Any = None,
    unwrapped_parameters: Any = None,
    customized_pruners: Any = None,
    forward_fn: Any = None,
    output_transform: Any = None,
    verify: Any = True,
) -> None:
    """Refuse options of :func:`~tp_importance.prunable_groups` that are none, or that speak of another network.

    Args:
        model: the network.
        ignored_layers: see there, as all that follow.
        num_heads: see there.
        unwrapped_parameters: see there.
        customized_pruners: see there.
        forward_fn: see there.
        output_transform: see there.
        verify: see there.

    Raises:
        TypeError: for an option of the wrong type.
        ValueError: for a layer or parameter that is not in the network, and for numbers that are impossible.

    Example:
        >>> net = nn.Linear(4, 2)
        >>> check_options(net, num_heads={net: 0})
        Traceback (most recent call last):
        ValueError: num_heads has 0 heads for the model: give a positive whole number
    """
    for name, function in (("forward_fn", forward_fn), ("output_transform", output_transform)):
        if function is not None and not callable(function):
            raise TypeError(f"{name} must be a function, not {function!r}")
    if not isinstance(verify, bool) and not callable(verify):
        raise TypeError(f"verify must be True, False or a function verify(groups, example_inputs), not {verify!r}")
    check_ignored(model, ignored_layers)
    _check_heads(model, num_heads)
    _check_parameters(model, unwrapped_parameters)
    _check_pruners(customized_pruners)


def check_ignored(model: nn.Module, ignored_layers: Any) -> None:
    """Refuse what ``ignored_layers`` does not take, or what is not in the network: it would not be kept.

    Args:
        model: the network.
        ignored_layers: modules, parameters and module types.

    Raises:
        TypeError: for something else.
        ValueError: for a module or parameter of another network.
    """
    if ignored_layers is None:
        return
    if isinstance(ignored_layers, nn.Module) or not isinstance(ignored_layers, Collection):
        raise TypeError(f"ignored_layers must be a list of modules, parameters or module types, not {ignored_layers!r}")
    known = {id(part) for part in (*model.modules(), *model.parameters())}
    for layer in ignored_layers:
        if isinstance(layer, type):
            if not issubclass(layer, nn.Module) and not any(isinstance(m, layer) for m in model.modules()):
                raise TypeError(f"ignored_layers takes types of modules; {layer.__name__} is none")
        elif isinstance(layer, (nn.Module, nn.Parameter)):
            if id(layer) not in known:
                raise ValueError(f"{_said(layer)} in ignored_layers is {_foreign(model)}")
        else:
            raise TypeError(f"ignored_layers takes modules, parameters or module types, not {layer!r}")


def _check_heads(model: nn.Module, num_heads: Any) -> None:
    if num_heads is None:
        return
    if not isinstance(num_heads, Mapping):
        raise TypeError(f"num_heads must be a dict {{projection: heads}}, not {num_heads!r}")
    names = {module: name or "the model" for name, module in model.named_modules()}
    for module, heads in num_heads.items():
        if not isinstance(module, nn.Module):
            raise TypeError(f"num_heads takes modules as keys, not {module!r}")
        if module not in names:
            raise ValueError(f"{_said(module)} in num_heads is {_foreign(model)}")
        if isinstance(heads, bool) or not isinstance(heads, Integral) or heads < 1:
            raise ValueError(f"num_heads has {heads!r} heads for {names[module]}: give a positive whole number")


def _check_parameters(model: nn.Module, given: Any) -> None:
    if given is None:
        return
    if isinstance(given, (Mapping, nn.Parameter)) or not isinstance(given, Collection):
        raise TypeError(f"unwrapped_parameters must be a list of pairs (parameter, axis), not {type(given).__name__}")
    names = {id(p): name for name, p in model.named_parameters()}
    for pair in given:
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and isinstance(pair[0], nn.Parameter)):
            said = type(pair).__name__ if isinstance(pair, nn.Parameter) else repr(pair)
            raise TypeError(f"unwrapped_parameters must be a list of pairs (parameter, axis), not of {said}")
        parameter, axis = pair
        if id(parameter) not in names:
            raise ValueError(f"{_said(parameter)} in unwrapped_parameters is {_foreign(model)}")
        if isinstance(axis, bool) or not isinstance(axis, Integral) or not -parameter.dim() <= axis < parameter.dim():
            raise ValueError(
                f"unwrapped_parameters: {names[id(parameter)]} of shape {tuple(parameter.shape)} has axes "
                f"0..{parameter.dim() - 1}, not {axis!r}"
            )


def _check_pruners(given: Any) -> None:
    if given is None:
        return
    if not isinstance(given, Mapping):
        raise TypeError(f"customized_pruners must be a dict {{module or type: pruning functions}}, not {given!r}")
    for key, pruner in given.items():
        if not isinstance(key, (nn.Module, type)):
            raise TypeError(f"customized_pruners takes modules and module types as keys, not {key!r}")
        if isinstance(pruner, type):
            raise TypeError(
                f"customized_pruners: {pruner.__name__} for {_said(key)} is a class, give {pruner.__name__}()"
            )
        if pruner is not None and not all(callable(getattr(pruner, name, None)) for name in _PRUNING_FUNCTIONS):
            raise TypeError(
                f"customized_pruners: {pruner!r} for {_said(key)} has no {', '.join(_PRUNING_FUNCTIONS)}; give an "
                "object of a class derived from torch_pruning.BasePruningFunc"
            )


def _said(part: Any) -> str:
    """A module, parameter or type in a few words."""
    if isinstance(part, type):
        return part.__name__
    if isinstance(part, nn.Parameter):
        return f"a parameter of shape {tuple(part.shape)}"
    text = repr(part)
    return text if "\n" not in text else f"a {type(part).__name__}"


def _foreign(model: nn.Module) -> str:
    return (
        f"not in {type(model).__name__}: give the object that is in this network now, not one of a copy, or one that "
        "pruning has replaced since"
    )
