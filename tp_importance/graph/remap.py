"""Carry optimizer state and weight averages over a surgery: parameters become new objects of new shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from ..checkpoints.content import integers
from ..core.copies import copied
from .cuts import make_cuts
from .groups import PrunableGroups
from .history import is_direct, repeat_cuts
from .host_graph import host_graph
from .surgery import planned_cuts
from .trace_options import TraceOptions

__all__ = ["Survivors", "check_optimizer", "named_tensors"]


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by every name they have."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


@dataclass(frozen=True, eq=False)
class Survivors:
    """Which entries of every parameter and buffer a surgery leaves.

    Attributes:
        index: per name the flat positions in the old tensor, in the shape of the new one, int64.
        shapes: shapes before.
    """

    index: dict[str, Tensor]
    shapes: dict[str, torch.Size]

    @classmethod
    def of(cls, groups: PrunableGroups, removed: Mapping[str, Sequence[int]]) -> Survivors:
        """Find out by the same surgery on a copy whose entries are their own positions.

        So it holds for whatever a pruning function does to a layer; nothing is derived twice.

        Args:
            groups: groups of the model as it is now; it is not changed.
            removed: units to remove, per group name.
        """
        coded, pruners, cuts = planned_cuts(groups, removed, copied(groups.trace.model))
        _code(coded)
        make_cuts(coded, cuts, pruners)
        return cls._read(groups.trace.model, coded)

    @classmethod
    def replay(
        cls, model: nn.Module, example_inputs: Any, history: Sequence[Any], options: TraceOptions = TraceOptions()
    ) -> Survivors:
        """Find out by repeating the history of any pruner on such a copy.

        Args:
            model: the network before the surgery; it is not changed.
            example_inputs: to trace the copy with, where the history needs Torch-Pruning's graph.
            history: entries of the surgery, ``[module name, is_out, indices]`` as Torch-Pruning writes them, or direct
                ones, see :class:`~tp_importance.graph.history.PruningHistory`.
            options: how the network is traced.
        """
        coded = copied(model)
        options = options.on_copy(model, coded)
        if is_direct(history) or not history:
            _code(coded)
            repeat_cuts(coded, history, options.customized_pruners)
        else:
            graph = host_graph(coded, example_inputs, options)
            _code(coded)
            graph.load_pruning_history([list(entry) for entry in history])
        return cls._read(model, coded)

    @classmethod
    def _read(cls, model: nn.Module, coded: nn.Module) -> Survivors:
        index = {name: t.detach().long() for name, t in named_tensors(coded).items()}
        return cls(index, {name: t.shape for name, t in named_tensors(model).items()})

    def alive(self, name: str) -> Tensor:
        """Which entries of parameter or buffer ``name`` are left, bool, in its old shape."""
        alive = torch.zeros(self.shapes[name].numel(), dtype=torch.bool, device="cpu")
        alive[self.index[name].flatten().cpu()] = True
        return alive.view(self.shapes[name])

    def take(self, name: str, tensor: Tensor) -> Tensor:
        """What is left of a tensor that is shaped like parameter or buffer ``name`` was; its memory format is kept."""
        index = self.index[name]
        if index.shape == tensor.shape:
            return tensor
        left = tensor.flatten()[index.to(tensor.device)]
        strided = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
        return left.contiguous(memory_format=torch.channels_last) if strided else left

    def settle(self, before: Mapping[str, Tensor], model: nn.Module) -> None:
        """Compare with what the surgery did to the model, and give tensors back their memory format.

        Args:
            before: parameters and buffers before.
            model: the network after the surgery.

        Raises:
            RuntimeError: if any entry differs.
        """
        for name, tensor in named_tensors(model).items():
            expected = self.take(name, before[name].detach())
            if expected.shape != tensor.shape or not torch.equal(expected, tensor.detach()):
                raise RuntimeError(f"the surgery left other entries of {name} in the model than in its copy")
            if expected.stride() != tensor.stride():
                tensor.data = expected

    def remap_optimizer(self, optimizer: Optimizer, before: Mapping[str, Tensor], model: nn.Module) -> None:
        """Give ``optimizer`` the new parameters in place of the old ones, with what is left of their state.

        Groups keep their order and hyperparameters, so learning rate schedulers go on. Parameters that are not of
        the model stay. Call :func:`check_optimizer` first.

        Args:
            optimizer: of the model before the surgery; changed in place.
            before: parameters before, by name.
            model: the network after it.
        """
        names = {id(t): name for name, t in reversed(list(before.items()))}
        after = dict(model.named_parameters(remove_duplicate=False))
        for group in optimizer.param_groups:
            group["params"] = [after[names[id(p)]] if id(p) in names else p for p in group["params"]]
        for old in [p for p in optimizer.state if id(p) in names]:
            name = names[id(old)]
            state = optimizer.state.pop(old)
            optimizer.state[after[name]] = {
                key: self.take(name, value) if isinstance(value, Tensor) and value.shape == old.shape else value
                for key, value in state.items()
            }

    def remap_twin(self, twin: Any, model: nn.Module) -> None:
        """Prune a weight average like the model: a module with the same layers, or a dict of tensors by name.

        Args:
            twin: such as ``torch.optim.swa_utils.AveragedModel``, a deep copy, or a state dict; changed in place.
            model: the network after the surgery.

        Raises:
            TypeError: if it is neither module nor dict.
            ValueError: if it has other layers or shapes.
        """
        self.require_fit(twin)
        if isinstance(twin, dict):
            for name in twin.keys() & self.index.keys():
                twin[name] = self.take(name, twin[name])
            return
        inner = _inner(twin)
        modules = dict(inner.named_modules())
        new: dict[int, Tensor] = {}
        for name, module in model.named_modules():
            for registry in (modules[name]._parameters, modules[name]._buffers):
                for leaf, tensor in registry.items():
                    full = f"{name}.{leaf}" if name else leaf
                    if tensor is None or self.index[full].shape == tensor.shape:
                        continue
                    if id(tensor) not in new:
                        left = self.take(full, tensor.detach())
                        is_parameter = isinstance(tensor, nn.Parameter)
                        new[id(tensor)] = nn.Parameter(left, tensor.requires_grad) if is_parameter else left
                    registry[leaf] = new[id(tensor)]
            for key, value in vars(module).items():
                if not key.startswith("_") and key != "training" and integers(value) is not None:
                    modules[name].__dict__[key] = value

    def require_fit(self, twin: Any) -> None:
        """Check that a weight average is one of the model before the surgery; as :meth:`remap_twin`."""
        if not isinstance(twin, (dict, nn.Module)):
            raise TypeError(f"a weight average must be a module or a dict of tensors, not {type(twin).__name__}")
        tensors = twin if isinstance(twin, dict) else named_tensors(_inner(twin))
        names = [name for name in tensors if name in self.index]
        wrong = [name for name in names if tuple(tensors[name].shape) != tuple(self.shapes[name])]
        if wrong or not names or (isinstance(twin, nn.Module) and names != list(self.index)):
            what = f"{wrong[0]} has shape {tuple(tensors[wrong[0]].shape)}" if wrong else "its layers have other names"
            raise ValueError(f"the weight average does not fit the model before pruning: {what}; pass a copy of it")


def _inner(twin: nn.Module) -> nn.Module:
    """The network inside an ``AveragedModel``."""
    return twin.module if isinstance(twin, AveragedModel) else twin


def _code(model: nn.Module) -> None:
    for tensor in named_tensors(model).values():
        tensor.grad = None
        # exact up to 2^53 entries
        tensor.data = torch.arange(tensor.numel(), dtype=torch.float64, device=tensor.device).view(tensor.shape)


def check_optimizer(optimizer: Any, model: nn.Module) -> None:
    """Refuse what cannot be carried over a surgery.

    Raises:
        TypeError: if it is no ``torch.optim.Optimizer``.
        ValueError: if it trains no parameter of the model, or keeps state of another shape than its parameters.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, not {type(optimizer).__name__}")
    names = {id(p): name for name, p in model.named_parameters()}
    if not any(id(p) in names for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            f"{type(optimizer).__name__} trains no parameter of the model; build the optimizer on model.parameters()"
        )
    for p, state in optimizer.state.items():
        for key, value in state.items():
            if id(p) in names and not _carried(value, p):
                raise ValueError(
                    f"{type(optimizer).__name__} keeps {key!r} for {names[id(p)]}, which is neither a number nor "
                    "shaped like the parameter and cannot follow a pruned channel; use an optimizer with elementwise "
                    "state (SGD, Adam, AdamW, RMSprop, ...)"
                )


def _carried(value: Any, parameter: Tensor) -> bool:
    if isinstance(value, Tensor):
        return value.shape == parameter.shape or value.numel() == 1
    return value is None or isinstance(value, (bool, int, float, str))
