"""Which function cuts a layer: Torch-Pruning's, the user's, or ours for what Torch-Pruning cannot cut, or in part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .reparametrised import LAYERS, computed_tensors, follows, slice_layer

__all__ = [
    "GROUPED_PRUNERS",
    "NEIGHBOURS",
    "RECURRENT",
    "LayerPruners",
    "channel_pruners",
    "grouped_pruner",
    "has_channels",
    "input_weights",
    "is_frozen_norm",
    "loses_whole_groups",
    "users_layers",
]

NEIGHBOURS = (nn.LocalResponseNorm, nn.CrossMapLRN2d)
"""Modules that divide every channel by what its neighbours hold."""

RECURRENT = (nn.RNNBase, nn.RNNCellBase)
"""Layers whose inputs can be pruned; their hidden size stays."""

_STATE = ("weight", "bias", "running_mean", "running_var")
_InstanceNorm = nn.modules.instancenorm._InstanceNorm


def is_frozen_norm(module: nn.Module) -> bool:
    """Whether a module holds a batch norm as buffers, as ``torchvision.ops.FrozenBatchNorm2d`` does.

    It has no parameters, and buffers ``weight``, ``bias``, ``running_mean`` and ``running_var``, one entry per channel.

    Args:
        module: any module.
    """
    own = module._buffers
    if not set(_STATE) <= own.keys() <= {*_STATE, "num_batches_tracked"} or any(True for _ in module.parameters()):
        return False
    shapes = {tuple(tensor.shape) for key in _STATE if (tensor := own[key]) is not None}
    return all(own[key] is not None for key in _STATE) and len(shapes) == 1 and len(next(iter(shapes))) == 1


def has_channels(norm: nn.Module) -> bool:
    """Whether an instance norm holds anything per channel; else it takes any number of them, whatever it says.

    Args:
        norm: an instance norm.
    """
    return any(t is not None and t.dim() == 1 for t in (*norm._parameters.values(), *norm._buffers.values()))


def channel_pruners(model: nn.Module, given: Mapping[Any, Any] | None = None) -> dict[Any, Any]:
    """Pruning functions for the layers of ``model`` that Torch-Pruning lacks, to be its ``customized_pruners``.

    All pruners of this package add them by themselves. Pass them to a pruner of Torch-Pruning's own.

    Args:
        model: the network.
        given: pruning functions of the user's, by type or module; they go before ours for their types and subclasses.

    Returns:
        ``{type: pruning function}``, with those of ``given``.

    Example:
        >>> layer = torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
        >>> net = nn.Sequential(layer, nn.InstanceNorm2d(4, track_running_stats=True), nn.ReLU(), nn.Conv2d(4, 2, 3))
        >>> sorted(t.__name__ for t in channel_pruners(net))
        ['InstanceNorm2d', 'ParametrizedConv2d']
    """
    theirs = dict(given or {})
    classes = tuple(key for key in theirs if isinstance(key, type))
    kinds: dict[type, list[nn.Module]] = {}
    for module in model.modules():
        if not isinstance(module, classes) and module not in theirs:
            kinds.setdefault(type(module), []).append(module)
    ours = {kind: _pruner(modules) for kind, modules in kinds.items()}
    return {**{kind: pruner for kind, pruner in ours.items() if pruner is not None}, **theirs}


class LayerPruners:
    """The pruning function of every module of a network, found without a dependency graph.

    Args:
        model: the network, before anything is cut: a layer that is computed from others is tried out as it is now.
        given: pruning functions of the user's, by type or module; see :func:`channel_pruners`.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        >>> pruner = LayerPruners(net).of(net[0])
        >>> pruner.prune_out_channels(net[0], [1, 2]).out_channels, LayerPruners(net).of(net[1])
        (2, None)
    """

    def __init__(self, model: nn.Module, given: Mapping[Any, Any] | None = None) -> None:
        self._known = channel_pruners(model, given)
        self._host = tp.DependencyGraph()
        for kind, pruner in self._known.items():
            self._host.register_customized_layer(kind, pruner)

    def of(self, module: nn.Module) -> Any:
        """Its pruning function, a ``tp.BasePruningFunc``; ``None`` if nobody knows one."""
        if (theirs := self._known.get(module)) is not None:
            return theirs
        if type(module) not in self._known and (ours := grouped_pruner(module)) is not None:
            return ours
        if type(module) not in self._known and isinstance(module, RECURRENT):
            return _RECURRENT_INPUTS
        pruner = self._host.get_pruner_of_module(module)
        return None if type(module) not in self._known and isinstance(pruner, tp.ops.DummyPruner) else pruner

    def on_one_side(self, module: nn.Module, role: str, positions: Sequence[int]) -> tuple[str, list[int]]:
        """Side and positions of one call that cuts a module, where several names of a cut are the same one.

        Args:
            module: the module.
            role: ``"out"`` or ``"in"``.
            positions: what goes of that side.

        Returns:
            Both as they are where the sides are cut apart; else side ``"out"`` and the positions there.
        """
        pruner = self.of(module)
        if isinstance(pruner, WholeGroupPruner):
            return "out", pruner.outputs_of(module, pruner.groups_of(module, role, positions))
        together = pruner is None or pruner.prune_in_channels == pruner.prune_out_channels
        return "out" if together else role, list(map(int, positions))


def users_layers(model: nn.Module, given: Mapping[Any, Any] | None) -> dict[str, Any]:
    """Pruning functions of the user's, by qualified name of the outermost modules that they are for.

    Args:
        model: the network.
        given: ``customized_pruners`` of Torch-Pruning, by type or module.
    """
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        pruner = (given or {}).get(module, (given or {}).get(type(module)))
        ours = type(pruner).__module__ == __name__  # handed on by channel_pruners
        if pruner is not None and not ours and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = pruner
    return found


def loses_whole_groups(module: nn.Module) -> bool:
    """Whether a convolution has one input channel per group and several outputs, or the reverse.

    Its groups are its channels: what it loses are whole groups, on both sides at once.

    Args:
        module: any module.

    Example:
        >>> loses_whole_groups(nn.Conv2d(4, 8, 3, groups=4)), loses_whole_groups(nn.Conv2d(4, 8, 3, groups=2))
        (True, False)
    """
    if not isinstance(module, nn.modules.conv._ConvNd) or module.groups == 1:
        return False
    return module.groups == min(module.in_channels, module.out_channels) < max(module.in_channels, module.out_channels)


def grouped_pruner(module: Any) -> Any:
    """Pruning function for a grouped convolution that Torch-Pruning's would cut wrongly, whatever its type.

    Args:
        module: any module.

    Returns:
        One of two shared objects, or ``None``.
    """
    if loses_whole_groups(module):
        return _WHOLE_GROUPS
    transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
    return (
        _GROUPED_TRANSPOSED if transposed and 1 < module.groups < min(module.in_channels, module.out_channels) else None
    )


def input_weights(module: nn.Module) -> list[str]:
    """Names of the weights by which a recurrent layer reads its input, each of shape (k·H, I): one per direction.

    Args:
        module: any module; of others there are none.

    Example:
        >>> input_weights(nn.GRU(4, 3, num_layers=2, bidirectional=True)), input_weights(nn.LSTMCell(4, 3))
        (['weight_ih_l0', 'weight_ih_l0_reverse'], ['weight_ih'])
    """
    if isinstance(module, nn.RNNCellBase):
        return ["weight_ih"]
    return (
        ["weight_ih_l0", "weight_ih_l0_reverse"][: 1 + module.bidirectional] if isinstance(module, nn.RNNBase) else []
    )


class RecurrentInputs(tp.BasePruningFunc):
    """Cuts the inputs of a recurrent layer, which Torch-Pruning does for ``nn.LSTM`` alone."""

    def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> nn.Module:
        raise ValueError(f"the hidden size of {layer} cannot be pruned")

    def prune_in_channels(self, layer: Any, idxs: Sequence[int]) -> nn.Module:
        gone = set(idxs)
        keep = [i for i in range(layer.input_size) if i not in gone]
        for name in input_weights(layer):
            setattr(layer, name, self._prune_parameter_and_grad(getattr(layer, name), keep, 1))
        layer.input_size = len(keep)
        return layer

    def get_out_channels(self, layer: Any) -> None:
        return None

    def get_in_channels(self, layer: Any) -> int:
        return int(layer.input_size)


_RECURRENT_INPUTS = RecurrentInputs()


def _pruner(modules: list[nn.Module]) -> Any:
    """Pruning function for some modules of one type; ``None`` where Torch-Pruning's will do."""
    module = modules[0]
    if all(map(is_frozen_norm, modules)):
        return FrozenNormPruner()
    if isinstance(module, _InstanceNorm):
        return InstanceNormPruner()
    if isinstance(module, nn.RMSNorm):
        return RMSNormPruner()
    if isinstance(module, NEIGHBOURS):
        return _Passing()
    # Torch-Pruning starts groups at depthwise convolutions with a function of its own
    if isinstance(module, LAYERS) and parametrize.is_parametrized(module) and getattr(module, "groups", 1) == 1:
        return ParametrisedPruner(modules)
    return None


class _PerChannel(tp.BasePruningFunc):
    """One entry per channel in every tensor the module has itself."""

    def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> nn.Module:
        width = self.get_out_channels(layer)
        assert width is not None
        keep = _kept(width, idxs)
        for key, parameter in list(layer._parameters.items()):
            if parameter is not None:
                setattr(layer, key, self._prune_parameter_and_grad(parameter, keep.tolist(), 0))
        for key, buffer in list(layer._buffers.items()):
            if buffer is not None and buffer.dim() == 1:
                setattr(layer, key, buffer[keep.to(buffer.device)])
        for key in ("num_features", "num_channels"):
            if vars(layer).get(key) == width:
                setattr(layer, key, len(keep))
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer: Any) -> int | None:
        return int(layer.weight.shape[0])

    def get_in_channels(self, layer: Any) -> int | None:
        return self.get_out_channels(layer)


class FrozenNormPruner(_PerChannel):
    """See :func:`is_frozen_norm`."""


class RMSNormPruner(_PerChannel):
    """Torch-Pruning knows layer norms only."""

    def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> nn.Module:
        width = int(layer.normalized_shape[0])
        super().prune_out_channels(layer, idxs)
        layer.normalized_shape = (width - len(set(idxs)),)
        return layer

    prune_in_channels = prune_out_channels


class InstanceNormPruner(_PerChannel):
    """Torch-Pruning's leaves the running statistics as they are, and trusts a number of features that torch ignores."""

    def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> nn.Module:
        if self.get_out_channels(layer) is not None:
            return super().prune_out_channels(layer, idxs)
        if len(idxs) < layer.num_features > max(idxs):
            layer.num_features -= len(idxs)
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer: Any) -> int | None:
        return int(layer.num_features) if has_channels(layer) else None


class ParametrisedPruner(tp.BasePruningFunc):
    """Dense convolutions and linear layers under ``torch.nn.utils.parametrize``.

    Args:
        layers: the layers it is for.

    Attributes:
        follows: by role, whether what is left of them is what it was, see :func:`.graph.reparametrised.follows`.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.follows = {role: all(follows(layer, role) for layer in layers) for role in ("out", "in")}

    def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> nn.Module:
        self._require("out", layer)
        slice_layer(layer, "out", _kept(self.get_out_channels(layer), idxs))
        return layer

    def prune_in_channels(self, layer: Any, idxs: Sequence[int]) -> nn.Module:
        self._require("in", layer)
        slice_layer(layer, "in", _kept(self.get_in_channels(layer), idxs))
        return layer

    def get_out_channels(self, layer: Any) -> int:
        return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)

    def get_in_channels(self, layer: Any) -> int:
        return int(layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels)

    def _require(self, role: str, layer: nn.Module) -> None:
        if not self.follows[role]:
            raise RuntimeError(
                f"a removed {role}put would change what the {type(layer).__name__} does to the others: "
                f"{computed_tensors(layer)[0].reason('...')}"
            )


class WholeGroupPruner(tp.BasePruningFunc):
    """Convolutions that lose whole groups, see :func:`loses_whole_groups`; either side may be named."""

    def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> nn.Module:
        return self._cut(layer, self.groups_of(layer, "out", idxs))

    def prune_in_channels(self, layer: Any, idxs: Sequence[int]) -> nn.Module:
        return self._cut(layer, self.groups_of(layer, "in", idxs))

    def get_out_channels(self, layer: Any) -> int:
        return int(layer.out_channels)

    def get_in_channels(self, layer: Any) -> int:
        return int(layer.in_channels)

    def groups_of(self, layer: Any, role: str, idxs: Sequence[int]) -> list[int]:
        """The groups that channels of one side make up.

        Raises:
            RuntimeError: if these are no whole groups.
        """
        size = (layer.out_channels if role == "out" else layer.in_channels) // layer.groups
        groups = sorted({int(i) // size for i in idxs})
        if len(set(map(int, idxs))) != size * len(groups):
            raise RuntimeError(
                f"a {type(layer).__name__} of {layer.groups} groups and {layer.in_channels} inputs loses whole groups "
                f"only, which {role}put channels {sorted(map(int, idxs))} are not"
            )
        return groups

    def outputs_of(self, layer: Any, groups: Sequence[int]) -> list[int]:
        """The output channels of some groups."""
        return self._channels(layer, layer.out_channels, groups)

    def _channels(self, layer: Any, width: int, groups: Sequence[int]) -> list[int]:
        return torch.arange(width, device="cpu").view(layer.groups, -1)[list(groups)].flatten().tolist()

    def _cut(self, layer: Any, gone: Sequence[int]) -> nn.Module:
        keep = _kept(layer.groups, gone).tolist()
        outputs, inputs = self.outputs_of(layer, keep), self._channels(layer, layer.in_channels, keep)
        layer.weight = self._prune_parameter_and_grad(layer.weight, inputs if layer.transposed else outputs, 0)
        if layer.bias is not None:
            layer.bias = self._prune_parameter_and_grad(layer.bias, outputs, 0)
        layer.out_channels, layer.in_channels, layer.groups = len(outputs), len(inputs), len(keep)
        return layer


class GroupedTransposedPruner(tp.BasePruningFunc):
    """Transposed convolutions with groups of several inputs and outputs; Torch-Pruning takes them for dense ones.

    Every group loses as many channels; of outputs the same ones, for all groups share an axis of the weight.
    """

    def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> nn.Module:
        gone = self._by_group(layer, "out", layer.out_channels, idxs)
        if not bool((gone == gone[0]).all()):
            raise RuntimeError(f"output channels {sorted(idxs)} are not the same ones of all {layer.groups} groups")
        columns = (~gone[0]).nonzero().flatten().tolist()
        layer.weight = self._prune_parameter_and_grad(layer.weight, columns, 1)
        if layer.bias is not None:
            kept = _kept(layer.out_channels, idxs).tolist()
            layer.bias = self._prune_parameter_and_grad(layer.bias, kept, 0)
        layer.out_channels = layer.groups * len(columns)
        return layer

    def prune_in_channels(self, layer: Any, idxs: Sequence[int]) -> nn.Module:
        self._by_group(layer, "in", layer.in_channels, idxs)
        keep = _kept(layer.in_channels, idxs).tolist()
        layer.weight = self._prune_parameter_and_grad(layer.weight, keep, 0)
        layer.in_channels = len(keep)
        return layer

    def get_out_channels(self, layer: Any) -> int:
        return int(layer.out_channels)

    def get_in_channels(self, layer: Any) -> int:
        return int(layer.in_channels)

    def _by_group(self, layer: Any, role: str, width: int, idxs: Sequence[int]) -> Tensor:
        """Which channels go, shape (groups, channels of one group)."""
        gone = torch.zeros(width, dtype=torch.bool, device="cpu")
        gone[list(map(int, idxs))] = True
        rows = gone.view(layer.groups, -1)
        if not bool((rows.sum(1) == rows[0].sum()).all()):
            raise RuntimeError(
                f"every group of a {type(layer).__name__} of {layer.groups} groups must lose as many {role}put "
                f"channels, which {sorted(map(int, idxs))} does not do"
            )
        return rows


_WHOLE_GROUPS, _GROUPED_TRANSPOSED = WholeGroupPruner(), GroupedTransposedPruner()
GROUPED_PRUNERS = (_WHOLE_GROUPS, _GROUPED_TRANSPOSED)
"""What :func:`grouped_pruner` may return."""


class _Passing(tp.BasePruningFunc):
    """A module without tensors, which takes any number of channels; so it has a node in the graph."""

    def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> nn.Module:
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer: Any) -> None:
        return None

    def get_in_channels(self, layer: Any) -> None:
        return None


def _kept(width: int, idxs: Sequence[int]) -> Tensor:
    mask = torch.ones(width, dtype=torch.bool, device="cpu")
    mask[torch.as_tensor(list(idxs), dtype=torch.int64, device="cpu")] = False
    return mask.nonzero().flatten()
