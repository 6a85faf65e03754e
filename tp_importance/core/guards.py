"""Leave the model as it was found: modes, gradient flags, hooks, structure and values, also after Ctrl-C."""

from __future__ import annotations

import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable
from types import CodeType, FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Guard", "gradients_kept", "preserved", "transaction", "writable", "written"]

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


class Guard(ABC):
    """A block after which something is put back, and never half of it.

    Ctrl-C raises ``KeyboardInterrupt`` inside the block as ever. While the guard takes its notes or puts things back,
    and after :meth:`commit`, it is held and raised when that is done. Only the main thread receives interrupts; in
    others, and where the handler of SIGINT is not a Python function, there is nothing to hold.
    """

    def __init__(self, given: Any = None) -> None:
        """Make a guard; its block yields ``given``."""
        self._given = given
        self._held = self._committed = self._pending = False
        self._handler: Any = None

    def commit(self) -> None:
        """Hold interrupts from here to the end of the block: what follows belongs together."""
        self._held = self._committed = True

    @abstractmethod
    def _note(self) -> None:
        """Take down what may have to be put back."""

    @abstractmethod
    def _restore(self, failed: bool) -> None:
        """Put back; ``failed``: the block raised."""

    def __enter__(self) -> Any:
        self._held = True  # an interrupt may come before signal.signal has returned
        if threading.current_thread() is threading.main_thread():
            handler = signal.getsignal(signal.SIGINT)
            if callable(handler):
                self._handler = handler
                signal.signal(signal.SIGINT, self._on_interrupt)
        try:
            self._note()
        except BaseException:
            self._release()
            raise
        self._held = False
        if self._pending:
            self._pending = False
            try:
                self._handler(signal.SIGINT, None)
            except BaseException as error:
                self.__exit__(type(error), error, None)
                raise
        return self._given

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._held = True  # before any call: an interrupt cannot come between
        try:
            self._restore(kind is not None)
        finally:
            self._release()

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._held or (frame is not None and frame.f_code in _EDGES):
            self._pending = True
        else:
            self._handler(number, frame)

    def _release(self) -> None:
        if self._handler is None:
            return
        handler, self._handler = self._handler, None
        signal.signal(signal.SIGINT, handler)
        if self._pending:
            handler(signal.SIGINT, None)


_EDGES: set[CodeType] = {Guard.__enter__.__code__, Guard.__exit__.__code__, Guard.commit.__code__}
"""Where an interrupt would come too early or too late for the guard to act on it."""


class preserved(Guard):
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

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._model = model

    def _note(self) -> None:
        model = self._model
        self._modules = [(m, m.training, m._is_full_backward_hook, _hook_ids(m)) for m in model.modules()]
        named = model.named_parameters(remove_duplicate=False)
        self._parameters = [(n, p, p.requires_grad) for n, p in named]

    def _restore(self, failed: bool) -> None:
        for module, training, full, hook_ids in self._modules:
            module.training = training
            module._is_full_backward_hook = full
            for key in HOOKS:
                hooks = getattr(module, key)
                for hook_id in [i for i in hooks if i not in hook_ids[key]]:
                    del hooks[hook_id]
        flags = {name: flag for name, _, flag in self._parameters}
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            _set_flag(parameter, flags.get(name, parameter.requires_grad))
        for _, parameter, flag in self._parameters:  # last: identity goes before name
            _set_flag(parameter, flag)


def _set_flag(parameter: nn.Parameter, flag: bool) -> None:
    if parameter.requires_grad != flag:
        parameter.requires_grad_(flag)


class transaction(Guard):
    """Put the structure of ``model`` back if the block raises: modules, parameters, buffers and attributes.

    Surgery replaces tensors and never writes into them, so that costs no copy. Tensors that are written into *in
    place* are named by ``values``; of these copies are held. A step that changes more than the model ends with
    :meth:`commit` and those assignments: Ctrl-C cannot come between.

    Args:
        model: the network.
        values: parameters and buffers whose values are put back, too; ``None`` is skipped.

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

    def __init__(self, model: nn.Module, values: Iterable[Tensor | None] = ()) -> None:
        super().__init__(model)
        self._model, self._values = model, values

    def _note(self) -> None:
        attributes = [vars(m) for m in self._model.modules()]
        inside = [v for items in attributes for v in items.values() if isinstance(v, dict)]
        # the dicts themselves come back, not their copies: the handle of a hook looks for it there
        self._items = [(items, items.copy()) for items in (*attributes, *inside)]
        self._copies = _copies(self._values)

    def _restore(self, failed: bool) -> None:
        if failed:
            for items, before in self._items:
                items.clear()
                items.update(before)
            _put_back(self._copies)


class written(Guard):
    """Put the values of ``tensors`` back if the block, which writes into them, raises.

    Args:
        tensors: parameters and buffers; ``None`` is skipped. Their copies are held until the block is left.
        always: put them back in any case.

    Example:
        >>> x = torch.zeros(2)
        >>> try:
        ...     with written([x]):
        ...         raise RuntimeError(x.fill_(1.0))
        ... except RuntimeError:
        ...     x.tolist()
        [0.0, 0.0]
    """

    def __init__(self, tensors: Iterable[Tensor | None], *, always: bool = False) -> None:
        super().__init__()
        self._tensors, self._always = tensors, always

    def _note(self) -> None:
        self._copies = _copies(self._tensors)

    def _restore(self, failed: bool) -> None:
        if failed or self._always:
            _put_back(self._copies)


class gradients_kept(Guard):
    """Give every parameter the gradient back that it had, and those that are new none.

    Args:
        model: the network.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> with gradients_kept(net):
        ...     net(torch.ones(2)).backward()
        >>> net.weight.grad is None
        True
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model

    def _note(self) -> None:
        self._before = [(p, p.grad) for p in self._model.parameters()]

    def _restore(self, failed: bool) -> None:
        self._model.zero_grad(set_to_none=True)
        for parameter, gradient in self._before:
            parameter.grad = gradient


def writable(tensor: Tensor) -> bool:
    """Whether values can be written into a tensor: not if it is expanded, as several elements then are one number.

    Example:
        >>> writable(torch.zeros(4)), writable(torch.zeros(1).expand(4))
        (True, False)
    """
    if tensor.is_nested or tensor.layout != torch.strided:
        return True
    return not any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def _copies(tensors: Iterable[Tensor | None]) -> list[tuple[Tensor, Tensor]]:
    chosen = {id(t): t for t in tensors if t is not None and writable(t)}
    return [(t, t.detach().clone()) for t in chosen.values()]


def _put_back(copies: Iterable[tuple[Tensor, Tensor]]) -> None:
    for tensor, values in copies:
        with torch.inference_mode(tensor.is_inference()), torch.no_grad():  # the former alone turns gradients on
            tensor.copy_(values)


def _hook_ids(module: nn.Module) -> dict[str, set[Any]]:
    return {key: set(getattr(module, key)) for key in HOOKS}
