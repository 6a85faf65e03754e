"""Replace layers that compute their weight in every forward pass by plain ones with the weight that they use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init
from torch.overrides import TorchFunctionMode

from ..core.arguments import checked_model
from ..core.batches import tensors_in
from ..core.forward import ForwardFn, layer_input, run_model, with_input
from ..core.guards import HOOKS, transaction
from ..core.stale_optimizers import replacing
from ..errors import TracingError
from .classes import ignored_modules
from .option_checks import check_ignored
from .reparametrised import LAYERS, computed_tensors
from .replacement import COMPUTE_WEIGHTS, calls_counted, passing, replace_modules, report_text

__all__ = ["BakeReport", "bake_weights"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_PLAIN = (*_CONVOLUTIONS, nn.Linear)
_KERNELS = {
    *(F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, F.linear),
    torch.convolution,
}
_ARGUMENTS = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class BakeReport:
    """What :func:`bake_weights` did.

    Attributes:
        baked: per layer that is plain now, what computed its weight.
        left_out: per layer that computes a weight, or may, and was left alone, why.
    """

    baked: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return report_text("baked", "layers", self.baked, self.left_out)


@torch.inference_mode(False)  # what is made there could take no gradient
def bake_weights(
    model: nn.Module,
    example_inputs: Any,
    *,
    ignored_layers: Sequence[nn.Module | nn.Parameter | type] | None = None,
    forward_fn: ForwardFn | None = None,
) -> BakeReport:
    r"""Make every computed weight a plain parameter, in place: standardised weights, weight norm, spectral norm, masks.

    A layer that standardises its filters, :math:`\hat W_{oi} = g_o (W_{oi} - \mu_o) / \sigma_o` with mean and deviation
    over all inputs *i*, changes every filter when an input goes; so its inputs cannot be pruned. After baking the layer
    is an ``nn.Conv2d`` (``nn.Linear``, …) that holds :math:`\hat W`, and they can. In eval mode the network computes
    what it did. A training that follows is another one: it moves :math:`\hat W` freely, nothing is standardised any
    more.

    Looked at are convolutions and linear layers of torch and of classes derived from them. The weight is the one that
    the layer hands to the convolution in a pass on the example inputs in eval mode. The plain layer must agree with the
    old one to 1e-5 of the largest output, on the inputs of that pass and on others (scaled by −½, one pixel smaller).

    Args:
        model: the network; build the optimizer afterwards. Weights that several layers compute from one parameter are
            parameters of their own afterwards.
        example_inputs: tensor, tuple of positional or dict of keyword arguments, batch dimension first.
        ignored_layers: modules (with everything inside), parameters or module types to leave alone.
        forward_fn: ``forward_fn(model, example_inputs)``; default calls the model.

    Returns:
        A :class:`BakeReport`. Layers whose weight is a parameter are not touched and not listed.

    Raises:
        TypeError: if the model is none, or compiled.
        TracingError: if the network does not run on the example inputs.
        ValueError: if a plain layer cannot do what the old one does (padding that depends on the size of the input, a
            weight that depends on the input or is another one at every call, hooks of the user), or the network does
            not call what was put in. The model is then as before.

    Example:
        >>> normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3))
        >>> net = nn.Sequential(normed, nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> bake_weights(net, torch.randn(1, 3, 8, 8)).baked, type(net[0]).__name__
        ({'0': 'parametrization WeightNorm'}, 'Conv2d')
    """
    check_ignored(checked_model(model), ignored_layers)
    ignored = ignored_modules(model, ignored_layers)
    baker = _Baker(model, ignored)
    with passing(model):
        try:
            before = baker.run(example_inputs, forward_fn)
        except (_Refused, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise TracingError(
                f"{type(model).__name__} does not run on example_inputs: {type(error).__name__}: {error}. Check "
                "device, dtype and shape; give forward_fn for unusual signatures"
            ) from error
    report = baker.report()
    if not report.baked:
        return report
    with replacing(model), transaction(model):
        replace_modules(model, baker.plain)
        with passing(model), calls_counted(baker.plain) as calls:
            try:
                after = tensors_in(run_model(model, example_inputs, forward_fn))
            except Exception as error:
                raise ValueError(
                    f"{type(model).__name__} does not run with plain layers in place of {', '.join(report.baked)} "
                    f"({type(error).__name__}: {error}); the model is as before. Pass what sets their weights from "
                    "outside in ignored_layers, or remove it"
                ) from error
        if calls:
            raise ValueError(
                f"{type(model).__name__} still calls the old layer {baker.names[calls[0]]} after it was replaced; keep "
                "layers in attributes or an nn.ModuleList, not in a list, or pass it in ignored_layers"
            )
        if len(before) != len(after) or not all(map(_agree, before, after)):
            raise ValueError(
                f"the outputs of {type(model).__name__} differ with plain layers in place of "
                f"{', '.join(report.baked)}, though every layer agrees by itself; the model is as before. Are the "
                "outputs random in eval mode?"
            )
    return report


class _Refused(ValueError):
    """A layer cannot be made plain."""


class _Weights(TorchFunctionMode):
    """Weight and bias of the convolutions and linear functions that the innermost watched layer calls."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[list[tuple[Tensor, Tensor | None]]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.open and func in _KERNELS:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            self.open[-1].append((weight, args[2] if len(args) > 2 else kwargs.get("bias")))
        return func(*args, **kwargs)


class _Baker:
    """Finds out in one pass which layers compute their weight, and makes and tries out the plain ones.

    Attributes:
        names: qualified name per layer.
        plain: the new layer per old one.
    """

    def __init__(self, model: nn.Module, ignored: set[nn.Module]) -> None:
        self._model = model
        self.names: dict[nn.Module, str] = {m: name for name, m in model.named_modules()}
        computed = {m: computed_tensors(m) for m in self.names if isinstance(m, LAYERS) and m not in ignored}
        # the weight of a class of torch without any of this is its parameter
        self._by: dict[nn.Module, str] = {
            m: " and ".join(dict.fromkeys(c.by for c in found))
            for m, found in computed.items()
            if found or type(m) not in _PLAIN
        }
        self._unknown_hook = {m for m, found in computed.items() if any(not c.remove for c in found)}
        self._hooked = {m: self._hooks(m) for m in self._by}
        self.plain: dict[nn.Module, nn.Module] = {}
        self._fine: set[nn.Module] = set()
        self._left: dict[nn.Module, str] = {}
        self._weights, self._trying = _Weights(), False

    def run(self, example_inputs: Any, forward_fn: ForwardFn | None) -> list[Tensor]:
        """The pass; returns the outputs."""
        for layer in self._by:  # `untouched` takes the hooks off
            layer.register_forward_pre_hook(self._enter, prepend=True)
            layer.register_forward_hook(self._leave, with_kwargs=True)
        with self._weights:
            return [t.clone() for t in tensors_in(run_model(self._model, example_inputs, forward_fn))]

    def report(self) -> BakeReport:
        baked = {self.names[m]: self._what(m) for m in self.names if m in self.plain}
        never: dict[nn.Module, str] = {
            m: "the pass on the example inputs does not call it" for m, by in self._by.items() if by
        }
        left = never | self._left
        done = self._fine | set(self.plain)
        return BakeReport(baked, {self.names[m]: reason for m, reason in left.items() if m not in done})

    def _what(self, layer: nn.Module) -> str:
        return self._by[layer] or f"the forward of {type(layer).__name__}"

    def _hooks(self, layer: nn.Module) -> list[Any]:
        """Hooks of the user, which a plain layer would lose."""
        kinds = [k for k in HOOKS if not k.endswith(("_with_kwargs", "_always_called"))]
        if layer in self._unknown_hook:
            kinds.remove("_forward_pre_hooks")  # one of them computes the weight
        return [h for k in kinds for h in getattr(layer, k).values() if not isinstance(h, COMPUTE_WEIGHTS)]

    def _enter(self, _layer: nn.Module, _args: Any) -> None:
        if not self._trying:
            self._weights.open.append([])

    def _leave(self, layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._trying:
            return
        found = self._weights.open.pop()
        self._trying = True
        try:
            self._look_at(layer, found, args, kwargs, output)
        finally:
            self._trying = False

    def _look_at(self, layer: Any, found: list[Any], args: Any, kwargs: Any, output: Any) -> None:
        computed = [pair for pair in found if not all(map(_is_own, pair, (layer._parameters.get(k) for k in _LEAVES)))]
        if not computed and not self._by[layer]:
            if found:
                self._fine.add(layer)
            else:
                self._left.setdefault(layer, "its forward calls no convolution or linear function with a weight")
            return
        if not found:
            self._left.setdefault(layer, f"{self._by[layer]}; its forward calls no convolution or linear function")
            return
        if len(found) > 1:
            raise self._refused(layer, f"its forward calls {len(found)} of them")
        if layer is self._model:
            raise self._refused(layer, "it is the model itself: put it into an nn.Sequential")
        if self._hooked[layer]:
            raise self._refused(layer, f"it has hooks, which would be lost ({self._hooked[layer][0]!r}): remove them")
        plain = self.plain.setdefault(layer, _plain(layer, *found[0]))
        difference = "on the inputs of the pass"
        agrees = _agree(output, _try(plain, args, kwargs))
        for what, x in _others(layer, layer_input(args, kwargs)) if agrees else ():
            expected = _try(layer, *with_input(args, kwargs, x))
            if isinstance(expected, Exception):
                continue  # the layer takes no such input
            difference, agrees = what, agrees and _agree(expected, _try(plain, *with_input(args, kwargs, x)))
            if not agrees:
                break
        if not agrees:
            raise self._refused(
                layer,
                f"its outputs differ from those of a plain {type(plain).__name__} {difference}. Its forward does more "
                "than that (padding that depends on the size of its input, a scale), or computes another weight for "
                "every input",
            )

    def _refused(self, layer: nn.Module, why: str) -> _Refused:
        return _Refused(
            f"{self.names[layer] or 'the model'} ({type(layer).__name__}) cannot become a plain convolution or linear "
            f"layer: {why}. The model is as before; to bake the others, pass this layer in ignored_layers"
        )


_LEAVES = ("weight", "bias")


def _is_own(used: Tensor | None, parameter: Tensor | None) -> bool:
    """Whether a layer uses its parameter itself, a view of it all, or its values in another precision."""
    if used is None or used is parameter:
        return True
    if parameter is None or used.shape != parameter.shape:
        return False
    return used.data_ptr() == parameter.data_ptr() or (
        used.dtype != parameter.dtype and torch.equal(used, parameter.to(used.dtype))
    )


def _plain(layer: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A layer of torch with these tensors; what else it needs it has from ``layer``."""
    kind: Any = next(c for c in type(layer).__mro__ if c in _PLAIN)
    if kind is nn.Linear:
        options = {"in_features": weight.shape[1], "out_features": weight.shape[0]}
    else:
        names = (*_ARGUMENTS, "output_padding") if layer.transposed else _ARGUMENTS
        options = {name: getattr(layer, name) for name in names}
    new: Any = skip_init(kind, **options, bias=bias is not None, device=weight.device, dtype=weight.dtype)
    trained = any(p.requires_grad for p in layer.parameters())
    new.weight = nn.Parameter(weight.detach().clone(), requires_grad=trained)
    new.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=trained)
    return new.eval()


def _try(layer: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    try:
        return layer(*args, **kwargs)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        return error


def _others(layer: Any, x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Inputs on which a layer shows that its weight depends on them, or its padding on their size."""
    yield "on other values", -0.5 * x
    yield "on larger values", 100 * x  # what clamps its input, say
    if not isinstance(layer, nn.Linear):
        for less in (1, 2):
            for dim in range(-len(layer.kernel_size), 0):
                x = x.narrow(dim, 0, max(x.shape[dim] - 1, 1))
            yield f"on an input that is {less} smaller", x


def _agree(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    most = a.abs().amax() if a.numel() else torch.zeros((), device="cpu")
    return bool(((a - b).abs() <= _TOLERANCE * most).all())
