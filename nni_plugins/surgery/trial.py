"""A copy of the network to try a removal on, apart from the user's random numbers, output and precision."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import logging
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from tp_importance.core.copies import copy_memo
from tp_importance.core.guards import HOOKS

__all__ = ["bound_inputs", "isolated", "run_trial", "tensors_of", "trial_copy"]


@contextlib.contextmanager
def isolated(model: nn.Module) -> Iterator[None]:
    """Fixed random numbers, silence, and NNI's new modules in the working precision; all undone on exit."""
    logger = logging.getLogger("nni.compression.speedup")
    level, dtype = logger.level, torch.get_default_dtype()
    with torch.random.fork_rng(range(torch.cuda.device_count())), contextlib.redirect_stdout(io.StringIO()):
        try:
            torch.manual_seed(0)
            logger.setLevel(logging.CRITICAL)
            torch.set_default_dtype(_precision(model))
            yield
        finally:
            logger.setLevel(level)
            torch.set_default_dtype(dtype)


def _precision(model: nn.Module) -> torch.dtype:
    """Float64 if the model has any, else float32: NNI knows no bfloat16, and widening loses nothing."""
    return torch.float64 if any(p.dtype == torch.float64 for p in model.parameters()) else torch.float32


def trial_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode, in the working precision and without hooks."""
    no_hooks: dict[int, Any] = {id(getattr(m, key)): OrderedDict() for m in model.modules() for key in HOOKS}
    try:
        return copy.deepcopy(model, copy_memo(model) | no_hooks).to(_precision(model)).eval()
    except Exception as error:
        raise RuntimeError(
            f"cannot copy {type(model).__name__} to try the removal on: {type(error).__name__}: {error}. Take out "
            "reparametrisations (weight norm, torch.nn.utils.prune) and cached tensors first"
        ) from error


def bound_inputs(model: nn.Module, example_inputs: Any) -> inspect.BoundArguments:
    """Copies of the example inputs under the names of ``forward``'s parameters, defaults filled in."""
    args = (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs
    if not isinstance(args, (tuple, list, Mapping)):
        raise TypeError(
            f"example_inputs are of type {type(args).__name__}; pass a tensor, a tuple of positional or a dict of "
            "keyword arguments"
        )
    signature, precision = inspect.signature(model.forward), _precision(model)
    try:
        bound = signature.bind(**args) if isinstance(args, Mapping) else signature.bind(*args)
    except TypeError as error:
        raise TypeError(f"example_inputs do not fit {type(model).__name__}.forward{signature}: {error}") from error
    bound.apply_defaults()
    for name, value in bound.arguments.items():
        bound.arguments[name] = tree_map(
            lambda x: (
                x.detach().clone().to(precision if x.is_floating_point() else x.dtype) if isinstance(x, Tensor) else x
            ),
            value,
        )
    return bound


def tensors_of(value: Any) -> list[Tensor]:
    """Tensors in nested tuples, lists and dicts."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def run_trial(trial: nn.Module, inputs: inspect.BoundArguments) -> list[Tensor]:
    """Outputs of the trial.

    Args:
        trial: the copy, masked or smaller.
        inputs: of :func:`bound_inputs`.

    Raises:
        RuntimeError: if it does not run.
    """
    args, kwargs = copy.deepcopy((inputs.args, inputs.kwargs))  # a network may write into them
    try:
        with torch.no_grad():
            return tensors_of(trial(*args, **kwargs))
    except Exception as error:
        raise RuntimeError(
            f"{type(trial).__name__} does not run on the example inputs, masked or with the channels removed: "
            f"{type(error).__name__}: {error}. If it runs unmasked, an operation with fixed sizes or a raw parameter "
            "does not follow the masks"
        ) from error
