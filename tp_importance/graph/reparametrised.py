"""Weights that are no parameters but computed anew in every forward pass: what computes them, and how to end it."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ..core.guards import HOOKS

__all__ = [
    "Computed",
    "as_leaves",
    "computed_tensors",
    "follows",
    "owner_of",
    "slice_layer",
    "sliced_sides",
    "weight_source",
]

LAYERS = (nn.modules.conv._ConvNd, nn.Linear)


@dataclass(frozen=True)
class Computed:
    """A tensor of a layer that is computed from others in every forward pass.

    Attributes:
        leaf: its name in the layer, ``"weight"`` say.
        by: what computes it.
        remove: what takes this back and leaves the present values as a parameter; ``{layer}`` stands for the layer;
            empty if it is not known.
    """

    leaf: str
    by: str
    remove: str

    def reason(self, name: str) -> str:
        """What stands in the way at the layer of qualified name ``name``, and the line that removes it."""
        what = f"{name}{'.' * bool(name)}{self.leaf} is computed ({self.by})"
        if not self.remove:
            return (
                f"{what}; make it a parameter, by bake_weights(model, example_inputs) if nothing sets it from outside"
            )
        return f"{what}; make it a parameter: {self.remove.format(layer=f'model.get_submodule({name!r})')}"


def computed_tensors(module: nn.Module) -> list[Computed]:
    """The tensors of ``module`` itself, not of its children, that are computed in every forward pass.

    Args:
        module: any module.

    Returns:
        One entry per tensor: of parametrizations (``torch.nn.utils.parametrize``), of the older
        ``torch.nn.utils.weight_norm`` and ``spectral_norm``, of masks (``torch.nn.utils.prune``), and for a convolution
        or linear layer a weight that anything else computes.

    Example:
        >>> layer = torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
        >>> [(c.leaf, c.by) for c in computed_tensors(layer)]
        [('weight', 'parametrization WeightNorm')]
    """
    found = []
    if parametrize.is_parametrized(module):
        for leaf, steps in _parametrizations(module).items():
            kinds = " and ".join(type(step).__name__.lstrip("_") for step in steps)
            remove = f"torch.nn.utils.parametrize.remove_parametrizations({{layer}}, {leaf!r})"
            found.append(Computed(leaf, f"parametrization {kinds}", remove))
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, (WeightNorm, SpectralNorm)):
            kind = "weight_norm" if isinstance(hook, WeightNorm) else "spectral_norm"
            remove = f"torch.nn.utils.remove_{kind}({{layer}}, {hook.name!r})"
            found.append(Computed(hook.name, f"torch.nn.utils.{kind}", remove))
        elif isinstance(hook, BasePruningMethod):
            leaf = hook._tensor_name
            found.append(Computed(leaf, "torch.nn.utils.prune", f"torch.nn.utils.prune.remove({{layer}}, {leaf!r})"))
    if isinstance(module, LAYERS) and "weight" not in (*module._parameters, *(c.leaf for c in found)):
        found.append(Computed("weight", "a hook or another library's wrapper", ""))
    return found


def owner_of(name: str) -> tuple[str, str] | None:
    """Layer and leaf that a module inside of parametrizations belongs to.

    Args:
        name: qualified name of the module, such as ``"conv.parametrizations.weight"``.

    Returns:
        ``None`` if it belongs to none.

    Example:
        >>> owner_of("conv.parametrizations.weight.0"), owner_of("conv")
        (('conv', 'weight'), None)
    """
    parts = name.split(".")
    if "parametrizations" not in parts[:-1]:
        return None
    at = parts.index("parametrizations")
    return ".".join(parts[:at]), parts[at + 1]


def weight_source(module: nn.Module) -> str | None:
    """Name, seen from the layer, of a parameter that is laid out like its weight: the weight itself if it is one.

    Args:
        module: a convolution or linear layer.

    Returns:
        ``None`` if there is none.
    """
    if "weight" in module._parameters:
        return "weight"
    if parametrize.is_parametrized(module, "weight"):
        for key, tensor in _parametrizations(module)["weight"].named_parameters():
            if tuple(tensor.shape) == weight_shape(module):
                return f"parametrizations.weight.{key}"
    return None


@contextmanager
def as_leaves(model: nn.Module) -> Iterator[None]:
    """Inside the block computed weights of layers are leaves of the autograd graph with their present values.

    They take gradients themselves, and the graph does not show how they are computed. Afterwards they are computed as
    before; what older hooks leave behind as an attribute holds no graph, so that the model can be copied.

    Args:
        model: the network.
    """
    with ExitStack() as stack:
        for module in model.modules():
            for what in computed_tensors(module):
                if parametrize.is_parametrized(module, what.leaf):
                    if not isinstance(module, LAYERS):
                        continue  # a parameter of the user's own module: the graph must show it
                    steps = _parametrizations(module)[what.leaf]
                    leaf = _present(steps)
                    if leaf.is_floating_point():
                        leaf.requires_grad_(True)
                    stack.callback(steps.register_forward_hook(_given(leaf)).remove)
                elif isinstance(getattr(module, what.leaf, None), Tensor) and module._forward_pre_hooks:
                    handle = module.register_forward_pre_hook(_cut(what.leaf, {}))  # runs after the hook that computes
                    stack.callback(_detach, module, what.leaf)
                    stack.callback(handle.remove)
        yield


@torch.no_grad()
def _present(steps: nn.Module) -> Tensor:
    """What parametrizations compute now; in training mode spectral norms would move on."""
    modes = [(module, module.training) for module in steps.modules()]
    try:
        value: Tensor = steps.eval()()
        return value.detach().clone()
    finally:
        for module, mode in modes:
            module.training = mode


def _given(leaf: Tensor) -> Any:
    # after a surgery inside the block it is of another shape
    return lambda _module, _args, output: leaf if leaf.shape == output.shape else output


def _cut(leaf: str, kept: dict[str, Tensor]) -> Any:
    def hook(module: nn.Module, _args: Any) -> None:
        now = getattr(module, leaf)
        if leaf not in kept or kept[leaf].shape != now.shape:
            kept[leaf] = now.detach().clone().requires_grad_(now.is_floating_point())
        setattr(module, leaf, kept[leaf])

    return hook


def _detach(module: nn.Module, leaf: str) -> None:
    setattr(module, leaf, getattr(module, leaf).detach())


def _parametrizations(module: Any) -> Any:
    return module.parametrizations


def weight_axis(module: Any, role: str) -> int:
    """Axis of the weight of a convolution or linear layer that its outputs (``"out"``) or inputs (``"in"``) are on."""
    return int((role == "in") != bool(getattr(module, "transposed", False)))


def weight_shape(module: Any) -> tuple[int, ...]:
    """Shape of the weight of a convolution or linear layer; to ask a spectral norm in training for it moves it on."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    sizes = (
        (module.in_channels, module.out_channels) if module.transposed else (module.out_channels, module.in_channels)
    )
    return sizes[0], sizes[1] // module.groups, *module.kernel_size


def slice_layer(module: Any, role: str, keep: Tensor) -> None:
    """Cut a parametrised convolution or linear layer: everything that its weight and bias are computed from.

    Args:
        module: the layer; not grouped.
        role: ``"out"`` or ``"in"``: the side that loses channels.
        keep: channels that stay, int64, ascending.
    """
    axis = weight_axis(module, role)
    width = weight_shape(module)[axis]
    leaves = {"weight": (axis, len(weight_shape(module))), "bias": (0, 1)}
    for leaf, (axis, dims) in leaves.items():
        if (role == "in" and leaf == "bias") or getattr(module, leaf) is None:
            continue
        if not parametrize.is_parametrized(module, leaf):
            _slice(module, "_parameters", leaf, axis, keep)
            continue
        for owner in _parametrizations(module)[leaf].modules():
            for registry in ("_parameters", "_buffers"):
                for key, tensor in list(getattr(owner, registry).items()):
                    at = None if tensor is None else _axis(tensor, axis, dims, width)
                    if at is not None:
                        _slice(owner, registry, key, at, keep)
    names = ("out_features", "in_features") if isinstance(module, nn.Linear) else ("out_channels", "in_channels")
    setattr(module, names[role == "in"], len(keep))


def sliced_sides(module: Any, leaf: str, tensor: Tensor) -> list[str]:
    """Sides (``"out"``, ``"in"``) of a layer on which :func:`slice_layer` cuts a tensor behind one of its own.

    Args:
        module: the layer.
        leaf: what is computed from the tensor: ``"weight"`` or ``"bias"``.
        tensor: the tensor.
    """
    if not isinstance(module, LAYERS) or leaf not in ("weight", "bias"):
        return []
    if leaf == "bias":
        outputs = module.out_features if isinstance(module, nn.Linear) else module.out_channels
        return ["out"] if _axis(tensor, 0, 1, outputs) == 0 else []
    axes = {role: weight_axis(module, role) for role in ("out", "in")}
    shape = weight_shape(module)
    sides = [role for role, axis in axes.items() if _axis(tensor, axis, len(shape), shape[axis]) is not None]
    return sides[:1] if tensor.dim() == 1 else sides


def _axis(tensor: Tensor, axis: int, dims: int, width: int) -> int | None:
    """Axis of a tensor behind a weight that belongs to ``axis`` of the weight, if it has one."""
    if tensor.dim() == dims:
        return axis if tensor.shape[axis] == width else None
    return 0 if tensor.dim() == 1 and tensor.shape[0] == width else None


def _slice(owner: nn.Module, registry: str, key: str, axis: int, keep: Tensor) -> None:
    old = getattr(owner, registry)[key]
    new = old.detach().index_select(axis, keep.to(old.device))
    if registry == "_buffers":
        setattr(owner, key, new)
        return
    parameter = nn.Parameter(new, requires_grad=old.requires_grad)
    if old.grad is not None:
        parameter.grad = old.grad.index_select(axis, keep.to(old.device))
    setattr(owner, key, parameter)


@torch.no_grad()
def follows(module: nn.Module, role: str) -> bool:
    """Whether a channel can be cut from all that a layer is computed from, and nothing else in it changes.

    Weight norm over each filter lets outputs go (``role="out"``), not inputs: an input that goes changes the norm of
    every filter. It is tried out on a copy, with the present values and with others.

    Args:
        module: a layer with computed tensors.
        role: ``"out"`` or ``"in"``: the side that loses channels.

    Example:
        >>> layer = torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
        >>> follows(layer, "out"), follows(layer, "in")
        (True, False)
    """
    parametrised = all(parametrize.is_parametrized(module, c.leaf) for c in computed_tensors(module))
    if not isinstance(module, LAYERS) or not parametrised or getattr(module, "groups", 1) > 1:
        return False
    generator = torch.Generator().manual_seed(0)
    for scrambled in (False, True):
        no_hooks: dict[int, Any] = {id(getattr(part, key)): OrderedDict() for part in module.modules() for key in HOOKS}
        whole: Any = copy.deepcopy(module, no_hooks).eval()  # those of a trace refer to it
        if any(p.dtype in (torch.float16, torch.bfloat16) for p in whole.parameters()):
            whole = whole.float()  # rounding must not look like a difference
        for parameter in whole.parameters() if scrambled else ():
            noise = torch.rand(parameter.shape, generator=generator, device="cpu") + 0.5
            parameter.data = parameter * noise.to(parameter)
        cut: Any = copy.deepcopy(whole)
        axis = weight_axis(module, role)
        keep = torch.arange(0, weight_shape(whole)[axis], 2, device="cpu")
        try:
            slice_layer(cut, role, keep)
            pairs = [(_selected(whole.weight, axis, keep), cut.weight)]
            if isinstance(whole.bias, Tensor):
                pairs.append((_selected(whole.bias, 0, keep) if role == "out" else whole.bias, cut.bias))
            if not all(a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in pairs):
                return False
        except (RuntimeError, ValueError, IndexError, TypeError):  # a parametrization of fixed sizes
            return False
    return True


def _selected(tensor: Any, axis: int, keep: Tensor) -> Tensor:
    return tensor.index_select(axis, keep.to(tensor.device))
