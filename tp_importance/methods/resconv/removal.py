"""Take residual convolutions out of a network for good, and leave nothing behind where that is possible.

A removed layer hands on a times its input (s = 0). First it is replaced by that factor, which is exact; then the factor
is moved into layers that have weights. The stream of a residual stage is one tensor in many places: its
factor goes into every layer that reads it, and out of every layer that adds to it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...core.arguments import checked_model
from ...core.batches import tensors_in
from ...core.devices import reference_tensor
from ...core.forward import call_model, run_model
from ...core.guards import preserved, transaction
from ...core.progress import phase
from ...core.stale_optimizers import replacing
from ...core.untouched import untouched
from ...graph.comparison import difference
from ...graph.dataflow import Flow, Kind, Span, record
from .block import ResConv2d, Scale, replace_module
from .folding import fold_scales

__all__ = ["RemovalReport", "outputs_of", "remove_layers", "require_same"]

LAYERS: dict[type[nn.Module], Kind] = {ResConv2d: "layer", Scale: "homogeneous"}
TOLERANCE = 1e-3
"""Largest difference of outputs allowed after folding, relative to the largest output; 10 ε in half precision."""


@dataclass(frozen=True)
class RemovalReport:
    """What became of removed layers.

    Attributes:
        removed: names of the layers that are gone.
        collapsed: modules that did nothing any more (a residual block whose layers are all gone, say), with the factor
            they stood for.
        kept_scales: factors that no layer could take, by the module that applies them now.
    """

    removed: list[str]
    collapsed: dict[str, float]
    kept_scales: dict[str, float]


@torch.inference_mode(False)  # what is made there could take no gradient
def remove_layers(
    model: nn.Module,
    example_inputs: Any,
    names: Iterable[str] | Mapping[str, float],
    *,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    repair: Callable[[], None] | None = None,
) -> RemovalReport:
    r"""Remove residual convolutions in place, as if their s were 0: :math:`y = \phi(a x)`.

    The factor a goes into all consumers of that tensor: weights of convolutions and linear layers, statistics of batch
    norms, slices behind a concatenation, the a of consumers that are still :class:`ResConv2d`; through adds also out of
    the layers that feed the same stream. What lies between must be positively homogeneous (ReLU, LeakyReLU, pools,
    reshapes). Where it is not (ReLU6, SiLU, sigmoid, an output of the network), one explicit :class:`Scale` stays; one
    by 1, a copy, stays where something writes in place. Activations that are modules and have become idle go, too,
    and so do blocks that only multiply: with both layers gone, :math:`\phi(a_2 \phi(a_1 x) + x) = (1 + a_1 a_2) x`.

    A layer with a = 0 would pass on nothing; it becomes the identity, with a warning, unless another factor is given.

    Args:
        model: a converted network.
        example_inputs: tensor, tuple or dict, batch dimension first.
        names: the layers to remove; with a mapping, what each hands on instead of its a.
        forward_fn: ``forward_fn(model, example_inputs)``.
        repair: called once the layers are gone and before their factors are moved, which scales tensors inside the
            network: until then they can be compared with those of the dense one. May change values in place.

    Returns:
        :class:`RemovalReport`. Parameters that changed are new objects.

    Raises:
        RuntimeError: if the network computes something else after folding; it is then as before.
        TypeError: if the model is none, compiled or wrapped.
        ValueError: if a name is not a :class:`ResConv2d`, or its factor is negative (given: not positive).

    Example:
        >>> from tp_importance.methods.resconv import convert_to_resconv
        >>> net = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1)]
        >>> x = torch.randn(1, 3, 8, 8)
        >>> net = convert_to_resconv(nn.Sequential(*net), x, s=0.0, a=0.5)
        >>> y = net(x)
        >>> remove_layers(net, x, ["2"]).kept_scales, [type(m).__name__ for m in net]
        ({}, ['Conv2d', 'ReLU', 'Identity', 'Identity', 'Conv2d'])
        >>> torch.allclose(net(x), y, atol=1e-6)
        True
    """
    checked_model(model)
    wanted = list(dict.fromkeys(names))
    given = names if isinstance(names, Mapping) else {}
    factors = {name: _factor(model, name, given.get(name)) for name in wanted}
    run = forward_fn or call_model

    def again() -> Flow:
        return record(model, example_inputs, layers=LAYERS, forward_fn=run)

    in_place = () if repair is None else (*model.parameters(), *model.buffers())
    with transaction(model, in_place), preserved(model), torch.no_grad(), replacing(model):
        idle = _idle_activations(model, again())
        for name, factor in factors.items():
            layer = model.get_submodule(name)
            replace_module(model, name, Scale(factor, like=layer.a).train(layer.training))  # type: ignore[arg-type]
        if repair is not None:
            repair()
        with phase("removing layers", layers=len(wanted)):
            before = outputs_of(model, example_inputs, run)
            collapsed = _collapse(model, again(), wanted)
            flow = again()
            idle = _idle_activations(model, flow) - idle
            kept = fold_scales(model, flow)
            for name in idle:
                replace_module(model, name, nn.Identity().train(model.get_submodule(name).training))
            _copy_what_is_written_to(model, {op.name for op in flow.ops if isinstance(op.module, Scale)} | idle, again)
            require_same(before, outputs_of(model, example_inputs, run), f"removing {', '.join(wanted)}")
    return RemovalReport(wanted, collapsed, kept)


def outputs_of(
    model: nn.Module, example_inputs: Any, run: Callable[[nn.Module, Any], Any] | None = None
) -> list[Tensor]:
    """Outputs in eval mode without gradients; modes are restored."""
    with untouched(model), torch.no_grad():
        model.eval()
        return [t.clone() for t in tensors_in(run_model(model, example_inputs, run))]


def require_same(before: list[Tensor], after: list[Tensor], what: str) -> None:
    """Refuse outputs that differ by more than rounding.

    Raises:
        RuntimeError: naming ``what`` and the difference.
    """
    for a, b in zip(before, after, strict=True):
        rounding = 10 * torch.finfo(a.dtype).eps if a.is_floating_point() else 0.0
        problem = difference(a, b, max(TOLERANCE, rounding))
        if problem:
            raise RuntimeError(f"{what} changes the output: it {problem}")


def _factor(model: nn.Module, name: str, given: float | None) -> float:
    module = dict(model.named_modules()).get(name)
    if not isinstance(module, ResConv2d):
        found = "no module" if module is None else f"a {type(module).__name__}"
        raise ValueError(
            f"{name!r} is {found}, not a ResConv2d: only those can be removed, call convert_to_resconv first"
        )
    if given is not None:
        if not given > 0:
            raise ValueError(f"layer {name} cannot hand on {given} times its input: the factor must be positive")
        return float(given)
    a = module.a.item()
    if not 0 <= a < math.inf:
        raise ValueError(
            f"layer {name} has a={a:g}; a removed layer hands on a times its input, so a must be finite and >= 0: "
            "train it with ResConvPruner.regularize, which sees to that, or clamp it"
        )
    if a == 0:
        warnings.warn(f"layer {name} has a=0 (not trained yet?): it becomes the identity", stacklevel=3)
    return a or 1.0


def _copy_what_is_written_to(model: nn.Module, names: set[str], flow_of: Callable[[], Flow]) -> None:
    """Put a copy (a Scale by 1) in place of an Identity whose output is changed in place afterwards.

    Convolutions and batch norms give new tensors, so ``relu_`` or ``+=`` may follow; without them the input of the
    removed layer would change, or what autograd has kept of it.
    """
    while True:
        flow, found = flow_of(), set[str]()
        for position, op in enumerate(flow.ops):
            for v in op.written:
                maker = flow.maker.get(v)
                new = maker is not None and (maker.module is not None or maker.kind == "add")
                if not new or len(flow.consumers[v]) > 1 or v in flow.outputs:
                    on_the_way = [s.name for s in flow.spans if s.outputs == (v,) and s.ops.stop <= position]
                    found.update([name for name in on_the_way if name in names][-1:])
        if not found:
            return
        names = names - found
        for name in found:
            old, like = model.get_submodule(name), reference_tensor(model)
            replace_module(model, name, Scale(like=like).train(old.training))


def _idle_activations(model: nn.Module, flow: Flow) -> set[str]:
    """Modules that only are a ReLU of what is ≥ 0 already, every time they run."""
    idle: dict[str, bool] = {}
    for span in flow.spans:
        ops = flow.ops[span.ops.start : span.ops.stop]
        nothing = len(ops) == 1 and ops[0].kind == "relu" and flow.nonnegative[ops[0].inputs[0]]
        idle[span.name] = idle.get(span.name, True) and nothing and isinstance(span.module, (nn.ReLU, nn.LeakyReLU))
    return {name for name, found in idle.items() if found}


def _collapse(model: nn.Module, flow: Flow, removed: list[str]) -> dict[str, float]:
    """Replace modules that hold removed layers and only multiply by the factor, outermost first."""
    root, factor = _proportions(flow)
    calls: dict[str, list[Span]] = {}
    for span in flow.spans:
        calls.setdefault(span.name, []).append(span)
    collapsed: dict[str, float] = {}
    for name in sorted(calls, key=lambda n: n.count(".")):
        inside = [layer for layer in removed if layer.startswith(f"{name}.")]
        if not inside or len(calls[name]) != 1 or any(name.startswith(f"{other}.") for other in collapsed):
            continue
        span = calls[name][0]
        if not span.plain or any(True for _ in span.module.parameters()):
            continue
        given, result = span.inputs[0], span.outputs[0]
        if root[given] == root[result]:
            collapsed[name] = factor[result] / factor[given]
            scales = [m.factor for m in span.module.modules() if isinstance(m, Scale)]
            like = scales[0] if scales else torch.ones((), device="cpu")
            replace_module(model, name, Scale(collapsed[name], like=like).train(span.module.training))
    return collapsed


def _proportions(flow: Flow) -> tuple[list[int], list[float]]:
    """For every tensor another one it is a fixed multiple of, as far back as possible, and the multiple."""
    root, factor = list(range(len(flow.shapes))), [1.0] * len(flow.shapes)
    for op in flow.ops:
        if isinstance(op.module, Scale):
            step = op.module.factor.item()
        elif op.kind == "same" or (op.kind == "relu" and flow.nonnegative[op.inputs[0]]):
            step = 1.0
        elif op.kind == "add" and len({root[v] for v in op.inputs}) == 1:
            root[op.outputs[0]] = root[op.inputs[0]]
            factor[op.outputs[0]] = sum(factor[v] for v in op.inputs)
            continue
        else:
            continue
        root[op.outputs[0]], factor[op.outputs[0]] = root[op.inputs[0]], factor[op.inputs[0]] * step
    return root, factor
