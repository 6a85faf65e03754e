"""Leave the model as it was found: modes, gradient flags, hooks, structure and values, also after Ctrl-C."""

from __future__ import annotations

import copy
import signal
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import ContextDecorator, contextmanager
from types import CodeType, FrameType, TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._pytree import tree_leaves

__all__ = [
    "Guard",
    "copied",
    "copied_with",
    "copy_memo",
    "full_precision",
    "preserved",
    "settled",
    "transaction",
    "warn_in_eval_mode",
    "written",
]

Model = TypeVar("Model", bound=nn.Module)

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
        if threading.current_thread() is threading.main_thread():
            handler = signal.getsignal(signal.SIGINT)
            if callable(handler):
                self._handler = handler
                signal.signal(signal.SIGINT, self._on_interrupt)
        self._held = True
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


def _copies(tensors: Iterable[Tensor | None]) -> list[tuple[Tensor, Tensor]]:
    return [(t, t.detach().clone()) for t in {id(t): t for t in tensors if t is not None}.values()]


def _put_back(copies: Iterable[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for tensor, values in copies:
            tensor.copy_(values)


def warn_in_eval_mode(model: nn.Module, *, stacklevel: int = 2) -> bool:
    """Warn if a network in training is in eval mode and has layers that work otherwise then.

    Batch norms in eval mode normalise by statistics that do not follow the weights: the training diverges, to NaN in
    the end. Single layers in eval mode are the user's choice, if the network is in train mode.

    Args:
        model: the network, just after a training step.
        stacklevel: as for :func:`warnings.warn`.

    Returns:
        Whether it has warned.
    """
    if model.training:
        return False
    kinds = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
    layers = [name for name, m in model.named_modules() if isinstance(m, kinds) and not m.training]
    if layers:
        warnings.warn(
            f"{type(model).__name__} is trained in eval mode: {len(layers)} batch norm or dropout layers ({layers[0]}, "
            "say) do not work as in a training, which will diverge; call model.train() before the training",
            stacklevel=stacklevel,
        )
    return bool(layers)


class full_precision(Guard, ContextDecorator):
    """Switch TensorFloat-32 off inside the block, or a function that it decorates: GPUs use it, with errors of 1e-3.

    Example:
        >>> import torch
        >>> with full_precision():
        ...     torch.backends.cudnn.allow_tf32
        False
    """

    def _note(self) -> None:
        owners: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
        self._before = [(owner, owner.allow_tf32) for owner in owners]
        for owner in owners:
            owner.allow_tf32 = False

    def _recreate_cm(self) -> full_precision:
        return full_precision()  # for every call of a decorated function

    def _restore(self, failed: bool) -> None:
        for owner, allowed in self._before:
            owner.allow_tf32 = allowed


def copied(model: Model) -> Model:
    """A deep copy of a network, also after a forward pass with gradients left a tensor with a graph in it.

    Args:
        model: the network; tensors inside of it that are not leaves of the autograd graph, such as the weight under the
            older ``torch.nn.utils.weight_norm`` or a cached activation, are copied without their graph.

    Example:
        >>> net = torch.nn.utils.weight_norm(nn.Linear(2, 2))
        >>> twin = copied(net)
        >>> net.weight.is_leaf, twin.weight.is_leaf
        (False, True)
    """
    return copied_with(model, None)[0]


def copied_with(model: Model, others: Any) -> tuple[Model, Any]:
    """The same, and a copy of ``others``, in which the layers of the network are those of its copy."""
    twin, options = copy.deepcopy((model, others), copy_memo(model))
    for module in twin.modules():
        if is_parametrized(module):  # copies share a class, and removing a parametrization changes the class
            kind = type(module)
            module.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))
    return twin, options


def copy_memo(model: nn.Module) -> dict[int, Any]:
    """What :func:`copy.deepcopy` is to take for the tensors of ``model`` that it refuses; see :func:`copied`."""
    held = (value for module in model.modules() for value in tree_leaves([vars(module), module._buffers]))
    return {id(t): t.detach().clone() for t in held if isinstance(t, Tensor) and not t.is_leaf}


def _hook_ids(module: nn.Module) -> dict[str, set[Any]]:
    return {key: set(getattr(module, key)) for key in HOOKS}
