"""Leave the model as it was found: modes, gradient flags and hooks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["full_precision", "preserved", "settled", "transaction", "written"]

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
"""The dictionaries, keyed by hook id, in which a module of torch keeps its hooks."""


@contextmanager
def preserved(model: nn.Module) -> Iterator[nn.Module]:
    """Restore training flags, ``requires_grad`` and hooks of ``model`` on every exit.

    Modules and parameters are followed by identity, so the flags also come back after the model was rebuilt around
    them. A parameter that was replaced meanwhile (as pruning does) takes over the flag of the one that bore its
    *name* before. Hooks added to known modules meanwhile are removed; hooks removed meanwhile stay removed. Modules
    and parameters that are new in every respect are left alone, and so are all values: weights, running statistics
    and gradients.

    Args:
        model: the network.

    Yields:
        The same model.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).train()
        >>> with preserved(net):
        ...     _ = net.eval().requires_grad_(False)
        >>> net[1].training, net[0].weight.requires_grad
        (True, True)
    """
    modules = [(m, m.training, m._is_full_backward_hook, _hook_ids(m)) for m in model.modules()]
    parameters = [(n, p, p.requires_grad) for n, p in model.named_parameters(remove_duplicate=False)]
    try:
        yield model
    finally:
        for module, training, full, hook_ids in modules:
            module.training = training
            module._is_full_backward_hook = full
            for key in HOOKS:
                hooks = getattr(module, key)
                for hook_id in [i for i in hooks if i not in hook_ids[key]]:
                    del hooks[hook_id]
        flags = {name: flag for name, _, flag in parameters}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            _set_flag(parameter, flags.get(name, parameter.requires_grad))
        for _, parameter, flag in parameters:  # last: identity goes before name
            _set_flag(parameter, flag)


def _set_flag(parameter: nn.Parameter, flag: bool) -> None:
    if parameter.requires_grad != flag:
        parameter.requires_grad_(flag)


@contextmanager
def transaction(model: nn.Module) -> Iterator[nn.Module]:
    """Put the structure of ``model`` back if the block raises: modules, parameters, buffers and attributes.

    Made for surgery, which replaces tensors and never writes into them: values changed *in place* inside the block
    stay changed. Costs no copy of any tensor.

    Args:
        model: the network.

    Yields:
        The same model.

    Example:
        >>> net = nn.Linear(3, 2)
        >>> try:
        ...     with transaction(net):
        ...         net.weight = nn.Parameter(net.weight[:, :1])
        ...         raise RuntimeError
        ... except RuntimeError:
        ...     net.weight.shape
        torch.Size([2, 3])
    """
    before = [(m, {k: v.copy() if isinstance(v, dict) else v for k, v in vars(m).items()}) for m in model.modules()]
    try:
        yield model
    except BaseException:
        for module, attributes in before:
            vars(module).clear()
            vars(module).update(attributes)
        raise


@contextmanager
def settled(model: nn.Module) -> Iterator[None]:
    """Around a surgery: new parameters and buffers are laid out in memory as those they replace, and have no gradient.

    Torch-Pruning gives contiguous ones, and cuts gradients along, which then look like those of the smaller network.

    Args:
        model: the network.

    Example:
        >>> net = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
        >>> with settled(net):
        ...     net.weight = nn.Parameter(net.weight[:2].contiguous())
        >>> net.weight.is_contiguous(memory_format=torch.channels_last)
        True
    """
    before = dict(_tensors(model))
    yield
    for name, tensor in _tensors(model):
        old = before.get(name)
        if old is None or old is tensor:
            continue
        tensor.grad = None
        layout = _LAST.get(old.dim())
        if layout is not None and tensor.dim() == old.dim() and not old.is_contiguous():
            if old.is_contiguous(memory_format=layout):
                tensor.data = tensor.data.contiguous(memory_format=layout)


_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


@contextmanager
def written(tensors: Iterable[Tensor | None]) -> Iterator[None]:
    """Put the values of ``tensors`` back if the block, which writes into them, raises.

    Args:
        tensors: parameters and buffers; ``None`` is skipped. Their copies are held until the block is left.

    Example:
        >>> x = torch.zeros(2)
        >>> try:
        ...     with written([x]):
        ...         raise RuntimeError(x.fill_(1.0))
        ... except RuntimeError:
        ...     x.tolist()
        [0.0, 0.0]
    """
    before = [(t, t.detach().clone()) for t in {id(t): t for t in tensors if t is not None}.values()]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for tensor, values in before:
                tensor.copy_(values)
        raise


@contextmanager
def full_precision() -> Iterator[None]:
    """Switch TensorFloat-32 off inside the block: GPUs use it by default, with errors of 1e-3.

    Example:
        >>> import torch
        >>> with full_precision():
        ...     torch.backends.cudnn.allow_tf32
        False
    """
    owners: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [owner.allow_tf32 for owner in owners]
    try:
        for owner in owners:
            owner.allow_tf32 = False
        yield
    finally:
        for owner, allowed in zip(owners, before, strict=True):
            owner.allow_tf32 = allowed


def _hook_ids(module: nn.Module) -> dict[str, set[Any]]:
    return {key: set(getattr(module, key)) for key in HOOKS}
