"""One forward pass under labels: beside every tensor that is computed, the channels its entries belong to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.weak import WeakTensorKeyDictionary

from ...core.batches import tensors_in
from ...core.forward import layer_input
from ..channel_axes import channel_dim
from ..kept_statistics import NORMS
from ..layer_pruners import RECURRENT
from .attributes import Named, WatchedSizes
from .calls import Call, Layers
from .hidden import customized, recurrence
from .layers import along, axes_of, compact, on_axis, pairs_of, tight
from .ledger import Follower, Ledger, Statistic
from .pieces import Pieces, followers_of
from .questions import factors_question, in_order, norm_groups_question, scale_question
from .reasons import ExclusionKind
from .rules import rule_of

__all__ = ["Labeller"]

_WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear)
_BAKE = "bake_weights(model, example_inputs) makes its weight a plain parameter"
_BARE_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


class Labeller(TorchDispatchMode):
    """Follows labels through all operations of the block; see :class:`~.calls.Run` for what rules may ask of it.

    Args:
        model: the network.
        ledger: takes what is found out.
        sizes: active around the same pass.
        inputs: tensors that the network is given.
        axes: parameters of which one axis alone is to have labels, by identity.
        custom: pruning functions of the user's, by qualified name of the module.
        answers: the axis that shrinks of splits that an earlier pass has met, by number of the operation.
        before: what that pass has found out.
        attention: of which factor of attention something may go, ``""``: of any.
    """

    def __init__(
        self,
        model: nn.Module,
        ledger: Ledger,
        sizes: WatchedSizes,
        inputs: Iterable[Tensor],
        axes: dict[int, int] | None = None,
        custom: dict[str, Any] | None = None,
        answers: dict[int, int] | None = None,
        before: Ledger | None = None,
        attention: str = "",
    ) -> None:
        super().__init__()
        self.ledger, self._sizes, self._axes = ledger, sizes, axes or {}
        self._number, self._answers, self._before = -1, answers or {}, before
        self._attention, self._heads = attention, set[int]()
        self._model, self._cuts = type(model).__name__, Pieces()
        # a tensor that the pass has made, with its layers, and whether it depends on the inputs
        self._known: Any = WeakTensorKeyDictionary()
        self._owned: dict[int, tuple[Tensor, str]] = {}
        for name, tensor in (*model.named_buffers(), *model.named_parameters()):
            self._owned[id(tensor)] = (tensor, name)
        weighted = [m for m in model.modules() if isinstance(m, _WEIGHTED)]
        self._kernels = {id(p) for m in weighted for p in m.parameters(recurse=False)}
        self._layers = {name for name, m in model.named_modules() if isinstance(m, _WEIGHTED)}
        self._labelled: dict[int, Layers] = {}
        self._open: list[str] = []
        self._types: dict[str, str] = {}
        self._hidden, self._custom = 0, custom or {}
        for tensor in inputs:
            self._known[tensor] = ((), True)

    def layers(self, tensor: Tensor) -> Layers:
        """Layers of labels of a tensor; those of a parameter are made when first asked for."""
        if id(tensor) in self._owned:
            if id(tensor) not in self._labelled:
                self._labelled[id(tensor)] = self._new_layers(tensor)
            return self._labelled[id(tensor)]
        found = self._known.get(tensor)
        return () if found is None else found[0]

    def depends(self, tensor: Tensor) -> bool:
        """Whether a tensor depends on the inputs of the network."""
        found = None if id(tensor) in self._owned else self._known.get(tensor)
        return found is not None and bool(found[1])

    def _new_layers(self, tensor: Tensor) -> Layers:
        if not tensor.is_floating_point():
            return ()
        axes: Iterable[int] = range(min(tensor.dim(), 2) if id(tensor) in self._kernels else tensor.dim())
        if id(tensor) in self._axes:
            axes = [self._axes[id(tensor)] % max(tensor.dim(), 1)]
        name, shape = self._owned[id(tensor)][1], tensor.shape
        sites = {axis: self.ledger.add_site(name, axis, shape[axis], tensor.device) for axis in axes}
        return tuple(on_axis(labels, axis, shape) for axis, labels in sites.items() if shape[axis] > 1)

    def flag(self, layer: Tensor, kind: ExclusionKind, text: str) -> None:
        """The labels of a layer must stay."""
        labels = compact(layer)
        if kind == "mixed" and self._of_own_weight(labels):
            text = f"{text}; {_BAKE}"
        self.ledger.flag(labels, kind, text)

    def _of_own_weight(self, labels: Tensor) -> bool:
        """Whether the convolution or linear layer that runs computes its weight from what has these labels."""
        if not self._open or self._open[-1] not in self._layers:
            return False
        most, own = int(labels.max()), f"{self._open[-1]}.".lstrip(".")
        return any(
            site.first <= most < site.first + site.size for site in self.ledger.sites if site.name.startswith(own)
        )

    def meet(self, a: Tensor, b: Tensor, where: str) -> Tensor:
        """Tie two layers of one shape, entry by entry; what has a label in one alone is pinned."""
        shape = a.shape
        a, b = torch.broadcast_tensors(compact(a), compact(b))
        self.ledger.tie(pairs_of(a, b))
        alone = torch.where(b == 0, a, torch.where(a == 0, b, 0))
        self.ledger.flag(alone, "pinned", f"{where}: its channels meet padding or constants, which stay")
        return torch.where(a != 0, a, b).expand(shape)

    def combine(self, operands: Sequence[tuple[Tensor, Layers]], shape: Sequence[int], where: str) -> Layers:
        """Layers of what is computed entry by entry from tensors that are broadcast to one shape."""
        result: list[Tensor] = []
        everywhere: dict[int, Tensor] = {}  # a single channel, a gate over pixels say: ties nothing, and is there once
        spread = [(t, [layer.expand(tuple(shape)) for layer in layers]) for t, layers in operands]
        for _, layers in spread:
            for layer in layers:
                mine = set(axes_of(layer))
                if not mine:
                    everywhere.setdefault(int(layer[(0,) * layer.dim()]) if layer.numel() else 0, layer)
                    continue
                for i, known in enumerate(result):
                    if mine & set(axes_of(known)):
                        more = len(axes_of(layer)) > len(axes_of(known))  # it sees heads and dimensions, say
                        result[i] = self.meet(layer, known, where) if more else self.meet(known, layer, where)
                        break
                else:
                    result.append(layer)
        free = []
        for layer in result:
            mine, met = set(axes_of(layer)), False
            for tensor, layers in spread if len(spread) > 1 else ():
                if not any(mine & set(axes_of(other)) for other in layers):  # else they have met
                    met |= any([self._meets_values(layer, axis - len(shape), tensor, where) for axis in mine])
            if not met:  # what has to stay as it is need not be followed: nothing that it meets can go
                free.append(layer)
        return (*free, *everywhere.values())

    def _meets_values(self, layer: Tensor, axis: int, tensor: Tensor, where: str) -> bool:
        """Whether channels meet a tensor that has none on their axis, and is not the same for all of them."""
        if -axis > tensor.dim() or tensor.shape[axis] == 1 or tensor.stride(axis) == 0:
            return False
        if bool((tensor == tensor.narrow(axis, 0, 1)).all()):
            return False
        self.flag(layer, "pinned", f"{where}: its channels meet values that belong to no channel")
        return True

    def follow(self, labels: Tensor, axis: int | None = None) -> None:
        """See :meth:`~.calls.Run.follow`."""
        sizes, shape = self._sizes.sizes, self._sizes.shape
        if axis is not None and shape is not None and axis < len(shape):
            sizes = [shape[axis]] if isinstance(shape[axis], Named) else []
        self.ledger.followers += followers_of(sizes, [labels])

    def pieces(self, tensor: Tensor, layer: Tensor, axis: int, bounds: Sequence[tuple[int, int]], call: Call) -> None:
        """The labelled axis of a tensor is cut into pieces, given by first index and index behind the last."""
        labels = compact(layer).flatten()
        self._cuts.add(tensor, axis, labels, bounds, self._sizes, call)

    def statistic(self, tensor: Tensor, layer: Tensor, axis: int, groups: int = 1) -> bool:
        """See :meth:`~.calls.Run.statistic`."""
        call = self._sizes.statistic
        if call is None or not self._open:  # outside of all modules nobody counts the calls of later passes
            return False
        if not (self.depends(tensor) or call.function in NORMS) or self._of_own_weight(compact(layer)):
            return False
        labels, pairs = along(layer, axis)
        self.ledger.tie(pairs)
        where = self._where(call.function)
        self.ledger.statistics.append(Statistic(call, axis - layer.dim(), labels.cpu().numpy(), groups, where))
        return True

    def split_up(self, layer: Tensor, call: Call) -> Tensor:
        """See :meth:`~.calls.Run.split_up`."""
        axis = self._answers.get(self._number)
        if axis in axes_of(layer):
            labels, pairs = along(layer, axis)
            self.ledger.tie(pairs)
            self._heads.update(labels.tolist())
            return on_axis(labels, axis, layer.shape)
        self.ledger.ask(factors_question(layer, call.where, self._number))
        return layer

    def attend(self, layer: Tensor, axes: Sequence[int], where: str, *, queries: str) -> bool:
        """See :meth:`~.calls.Run.attend`."""
        small = compact(layer)
        settled = self._attention == "heads" and self._heads.issuperset(small[small > 0].tolist())
        found = self.ledger.attend(small, () if settled else axes, where, self._number)
        if not found.may_go(self._attention):
            return False
        if queries == "no" or found.axis is None:
            return True
        before = self._before.attended if self._before is not None else ()  # there every filter has a label of its own
        dense = next((a for a in before if a.number == self._number and a.axis is not None), found)
        if queries == "yes":
            self.ledger.scaled.append(dense)
        else:
            self.ledger.ask(scale_question(found, dense))
        return True

    def norm_groups(self, labels: Tensor, call: Call) -> None:
        """See :meth:`~.calls.Run.norm_groups`."""
        followers = tuple(followers_of(self._sizes.sizes, [labels[:, 0]]))
        self.ledger.ask(norm_groups_question(labels, followers, call.where))

    def finish(self, outputs: Iterable[Tensor]) -> None:
        """The pass is over.

        Args:
            outputs: what the network returned.
        """
        for tensor in outputs:
            for layer in self.layers(tensor):
                self.flag(layer, "output", "produces the network's output")
        first = self._before or self.ledger  # there every filter has a label of its own
        attended = [a.known for a in first.attended] if self._attention == "dims" else []
        for question in self._cuts.questions(np.concatenate([*attended, np.zeros(0, np.int64)])):
            self.ledger.ask(question)
        self.ledger.questions = in_order(self.ledger.questions, self.ledger.ties, self.ledger.size)

    def watch(self, stack: ExitStack, model: nn.Module) -> None:
        """Keep track of the module that runs; inside of recurrent layers labels are not followed."""
        for name, module in model.named_modules():
            stack.callback(module.register_forward_pre_hook(self._enter(name), prepend=True).remove)
            if isinstance(module, _WEIGHTED):  # behind the hooks that compute weights
                stack.callback(module.register_forward_pre_hook(self._find_weights).remove)
                stack.callback(module.register_forward_pre_hook(self._refuse_samples, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(self._leave, with_kwargs=True).remove)

    def _enter(self, name: str) -> Any:
        def hook(module: Any, _args: Any) -> None:
            self._open.append(name)
            self._sizes.calls.enter(name)
            self._types[name] = type(module).__name__
            self._hidden += self._is_hidden(name, module)

        return hook

    def _find_weights(self, module: Any, _args: Any) -> None:
        """Computed weights and biases are tensors of their own, but for those that a hook puts over a parameter."""
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            for leaf in ("weight", "bias"):
                tensor, own = getattr(module, leaf, None), module._parameters.get(leaf)
                if own is None and isinstance(tensor, Tensor) and id(tensor) not in self._owned:
                    self._owned[id(tensor)] = (tensor, f"{self._open[-1]}.{leaf}".lstrip("."))
                    self._kernels.add(id(tensor))

    def _refuse_samples(self, module: Any, args: Any, kwargs: Any) -> None:
        """What a layer reads is compared and refitted by its channels: all other axes keep their size."""
        x = layer_input(args, kwargs)
        if self._hidden or not isinstance(x, Tensor):
            return
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            where = f"{self._open[-1]} ({type(module).__name__})"
            for layer in self.layers(x):
                if axes_of(layer) and x.dim() + channel_dim(module) not in axes_of(layer):
                    self.flag(layer, "mixed", f"{where} runs once for every one of its channels")

    def _is_hidden(self, name: str, module: nn.Module) -> bool:
        return isinstance(module, RECURRENT) or name in self._custom

    def _leave(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        name = self._open[-1]
        if self._is_hidden(name, module):
            self._hidden -= 1
            if not self._hidden:
                with torch._C.DisableTorchFunction(), _disable_current_modes():
                    given, where = tensors_in((args, kwargs)), self._where(type(module).__name__)
                    if name in self._custom:
                        made = customized(self, name, module, self._custom[name], given, tensors_in(output), where)
                        for tensor, layers in made:
                            self._note(tensor, layers, True)
                    else:
                        recurrence(self, module, layer_input(args, kwargs), given, where)
        elif isinstance(module, _BARE_NORMS) and module.weight is None and args:
            self._count_features(name, module, args[0])
        elif isinstance(module, nn.GroupNorm) and args:
            numbers = ["num_groups"] if module.num_groups == module.num_channels else []
            numbers += [] if module.affine else ["num_channels"]
            self._count(name, numbers, module.num_channels, args[0], 1)
        self._open.pop()
        self._sizes.calls.leave(name)

    def _count_features(self, name: str, module: Any, x: Tensor) -> None:
        """Nothing of a norm without tensors is cut, but the number of features that it was built for follows."""
        if module.running_mean is not None:
            return
        axis = 1 if x.dim() > 2 or not isinstance(module, nn.modules.instancenorm._InstanceNorm) else 0
        self._count(name, ["num_features"], module.num_features, x, axis)

    def _count(self, name: str, attributes: Sequence[str], value: int, x: Tensor, axis: int) -> None:
        """Attributes of a module, all of this value, count the channels of a tensor."""
        if self._hidden:
            return
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            for layer in self.layers(x):
                labels = compact(layer).flatten()
                if axes_of(layer) == (axis,) and len(labels) == value:
                    found = [Follower(f"{name}.{key}", value, labels.cpu().numpy()) for key in attributes]
                    self.ledger.followers += found

    def _where(self, name: str) -> str:
        layer = self._open[-1] if self._open else ""
        kind = self._types.get(layer, self._model)
        function = self._sizes.function or name
        return f"{layer} ({kind}, {function})" if layer else f"{kind} ({function})"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        self._number += 1
        with torch._C.DisableTorchFunction():
            self._follow(func, args, kwargs, output)
        return output

    def _follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given, outputs = tensors_in((args, kwargs)), tensors_in(output)
        depends = self._hidden > 0 or any(self.depends(t) for t in given)
        mutates = func._schema.is_mutable
        found: list[Layers] = []
        if not self._hidden and any([self.layers(t) for t in given]):
            name = func._schema.name.rpartition("::")[2]
            if mutates and name.endswith("_") and not name.endswith("__"):
                name = name[:-1]
            found = rule_of(func, name)(self, Call(name, func, args, kwargs, outputs, self._where(name)))
        for i, tensor in enumerate(outputs):
            layers = found[i] if i < len(found) else ()
            if mutates and any(tensor is t for t in given):
                self._write(tensor, layers, depends)
            else:
                self._note(tensor, layers, depends)

    def _note(self, tensor: Tensor, layers: Layers, depends: bool) -> None:
        """Write down the layers of a tensor that was computed; parameters and buffers keep theirs."""
        if id(tensor) not in self._owned:
            self._known[tensor] = (layers, depends)

    def _write(self, tensor: Tensor, layers: Layers, depends: bool) -> None:
        """A tensor was written into: all others in the same memory change with it."""
        before = self.layers(tensor)
        self._note(tensor, layers, depends or self.depends(tensor))
        if len(before) == len(layers) and all(a is b for a, b in zip(before, layers, strict=True)):
            return
        storage = tensor.untyped_storage()
        others = [t for t in list(self._known) if t is not tensor and t.untyped_storage()._cdata == storage._cdata]
        others.sort(key=lambda t: -t.numel())
        known = {id(t): self.layers(t) for t in others}
        made: dict[int, list[Tensor]] = {id(t): [] for t in others}
        for slot in range(max((len(layers), *map(len, known.values())), default=0) if others else 0):
            memory = torch.zeros(storage.nbytes() // tensor.element_size(), dtype=torch.int64, device=tensor.device)
            for t in others:
                if slot < len(known[id(t)]):
                    memory.as_strided(t.shape, t.stride(), t.storage_offset()).copy_(known[id(t)][slot])
            place = memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
            place.copy_(layers[slot]) if slot < len(layers) else place.zero_()
            for t in others:
                left = tight(memory.as_strided(t.shape, t.stride(), t.storage_offset()).clone())
                made[id(t)] += [] if left is None else [left]
        for t in others:
            self._note(t, tuple(made[id(t)]), depends or self.depends(t))
