"""What every pruner is given, checked before anything runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..budget import Budget

__all__ = ["checked_budget", "checked_importance", "checked_model", "require_writable", "unwrapped_model"]

_WRAPPERS = {
    "DataParallel": "spreads batches over devices",
    "DistributedDataParallel": "exchanges gradients of the parameters that it was built with",
    "FullyShardedDataParallel": "spreads the weights over processes",
    "DeepSpeedEngine": "spreads the weights or their gradients over processes",
    "AveragedModel": "averages the weights of another network",
}
"""Modules that hold a network as ``.module``, by the name of one of their classes: torch's, and others' so called."""

_CHANGED = {("FSDPModule", "fully_shard"), ("DDP", "replicate")}
"""Classes of ``torch.distributed`` that a function adds to the class of a network, which stays the same object."""


def checked_model(model: Any, argument: str = "model") -> nn.Module:
    """``model``, if it is a network whose layers can be looked at and replaced.

    Compiled code calls no hooks that were added later: what is counted or collected from it may be empty. Lazy layers
    get their weights, and become other modules, when they run for the first time.

    Args:
        model: what was given.
        argument: how the user calls it.

    Raises:
        TypeError: if it is no module, or it or a part of it is compiled, exported, wrapped (see
            :func:`unwrapped_model`), or lazy and has not run yet.

    Example:
        >>> checked_model(lambda x: x)
        Traceback (most recent call last):
        TypeError: model must be a torch.nn.Module, not function
    """
    for name, module in unwrapped_model(model, argument).named_modules():
        whole = f"{argument}{'.' * bool(name)}{name}"
        if "_orig_mod" in module._modules:
            raise TypeError(
                f"{whole} is compiled by torch.compile, and compiled code hides its layers: use {whole}._orig_mod, "
                "which has the same parameters, and compile again after pruning"
            )
        if isinstance(module, torch.fx.GraphModule) and "eval" in vars(module):  # torch.export's
            raise TypeError(
                f"{whole} was made by torch.export and has neither layers nor an eval mode: prune the Python "
                "module, and export it afterwards"
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(
                f"{whole} is a {type(module).__name__}: code that torch.jit has compiled takes no hooks and cannot be "
                "pruned; prune the Python module, and script or trace it afterwards"
            )
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise TypeError(
                f"{name or 'the model'} is compiled in place by .compile(), and compiled code hides its layers: prune "
                "first and compile then, or take it back by module._compiled_call_impl = None"
            )
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if is_lazy(tensor):
                where = f"{name}.{key}" if name else key
                raise TypeError(
                    f"{where} of the lazy {type(module).__name__} has no shape yet: run the model once, "
                    "model(example_inputs), and prune then"
                )
    return model


def require_writable(model: nn.Module) -> None:
    """Refuse a network whose weights and statistics take no new values: those that were made in inference mode.

    Args:
        model: the network.

    Raises:
        ValueError: naming the first of them.

    Example:
        >>> with torch.inference_mode():
        ...     net = nn.Linear(2, 2)
        >>> require_writable(net)
        Traceback (most recent call last):
        ValueError: weight was made in torch.inference_mode() and takes no new values: give copy.deepcopy(model), made \
outside of it, or refit=None
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_inference():
            raise ValueError(
                f"{name} was made in torch.inference_mode() and takes no new values: give copy.deepcopy(model), made "
                "outside of it, or refit=None"
            )


def unwrapped_model(model: Any, argument: str = "model") -> nn.Module:
    """``model``, if it is a network by itself, in one piece: no wrapper of it, and not spread over processes.

    Pruning makes new parameters. A wrapper that was built for the old ones goes on with those: gradients are then no
    longer exchanged between processes, without an error.

    Args:
        model: what was given.
        argument: how the user calls it.

    Raises:
        TypeError: if it is no module, or it or a part of it is wrapped (``DataParallel``, ``DistributedDataParallel``,
            ``FullyShardedDataParallel``, ``AveragedModel``, ...) or sharded (``fully_shard``, tensor parallel).

    Example:
        >>> unwrapped_model(nn.DataParallel(nn.Linear(2, 2)))
        Traceback (most recent call last):
        TypeError: model is wrapped in DataParallel, which spreads batches over devices; pruning makes new parameters, \
which it would not know: give model.module, and wrap it again after pruning
    """
    if not isinstance(model, nn.Module):
        given = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise TypeError(f"{argument} must be a torch.nn.Module, not {given}")
    for name, module in model.named_modules():
        whole, bases = f"{argument}{'.' * bool(name)}{name}", type(module).__mro__
        wrapper = next((c.__name__ for c in bases if c.__name__ in _WRAPPERS), None)
        if wrapper is not None and isinstance(getattr(module, "module", None), nn.Module):
            raise TypeError(
                f"{whole} is wrapped in {type(module).__name__}, which {_WRAPPERS[wrapper]}; pruning makes new "
                f"parameters, which it would not know: give {whole}.module, and wrap it again after pruning"
            )
        added = {c.__name__ for c in bases if c.__module__.startswith("torch.distributed.")}
        how = next((how for name, how in _CHANGED if name in added), None)
        if how is not None:
            raise TypeError(
                f"{whole} was given to {how}, which keeps track of its present parameters; pruning makes new ones: "
                f"prune the network first, in one process, and call {how} afterwards"
            )
        for key, parameter in module._parameters.items():
            if type(parameter).__name__ == "DTensor":
                raise TypeError(
                    f"{whole}.{key} is a DTensor, of which this process holds a part only: prune the network first, in "
                    "one process, and shard it afterwards"
                )
    return model


def checked_budget(budget: Any) -> Budget:
    """``budget``, if it is one.

    Raises:
        TypeError: else.
    """
    if not isinstance(budget, Budget):
        raise TypeError(f"budget must be a Budget, e.g. Budget(macs=0.5), not {budget!r}")
    return budget


def checked_importance(importance: Any, argument: str = "importance") -> Any:
    """``importance``, if it can value channels: it has ``curves(groups)``, or is called with a ``tp.Group``.

    Args:
        importance: what was given.
        argument: how the user calls it.

    Raises:
        TypeError: else.
    """
    if isinstance(importance, type):
        name = importance.__name__
        raise TypeError(f"{argument}={name} is a class; make one of it: {argument}={name}()")
    if isinstance(importance, str) or not (callable(importance) or hasattr(importance, "curves")):
        raise TypeError(
            f"{argument}={importance!r} cannot value channels; give an importance of this package or of Torch-Pruning, "
            f"e.g. {argument}=OBSImportance()"
        )
    return importance
