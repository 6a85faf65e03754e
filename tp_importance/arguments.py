"""What every pruner is given, checked before anything runs."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from .budget import Budget

__all__ = ["checked_budget", "checked_importance", "checked_model"]


def checked_model(model: Any) -> nn.Module:
    """``model``, if it is a network whose layers can be looked at.

    Compiled code calls no hooks that were added later: what is counted or collected from it may be empty. Lazy layers
    get their weights, and become other modules, when they run for the first time.

    Raises:
        TypeError: if it is no module, or it or a part of it is compiled or lazy and has not run yet.

    Example:
        >>> checked_model(lambda x: x)
        Traceback (most recent call last):
        TypeError: model must be a torch.nn.Module, not function
    """
    if not isinstance(model, nn.Module):
        given = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise TypeError(f"model must be a torch.nn.Module, not {given}")
    for name, module in model.named_modules():
        if "_orig_mod" in module._modules:
            whole = f"model{'.' * bool(name)}{name}"
            raise TypeError(
                f"{whole} is compiled by torch.compile, and compiled code hides its layers: use {whole}._orig_mod, "
                "which has the same parameters, and compile again after pruning"
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
