"""Labels through operations that work entry by entry."""

from __future__ import annotations

from torch import Tensor

from .calls import Call, Layers, Run
from .layers import axes_of, on_axis

__all__ = ["RULES", "pointwise"]


def pointwise(run: Run, call: Call) -> list[Layers]:
    """Labels that meet are tied."""
    shape = call.outputs[0].shape
    return [run.combine([(t, run.layers(t)) for t in call.inputs], shape, call.where)] * len(call.outputs)


def unary(run: Run, call: Call) -> list[Layers]:
    """The first tensor alone matters."""
    return [run.layers(call.inputs[0])]


def same_shape(run: Run, call: Call) -> list[Layers]:
    """A new tensor that is made in the shape of another one: its size follows the channels."""
    own = run.layers(call.inputs[0])
    return [own if call.outputs[0].shape == call.inputs[0].shape else ()]


def written(run: Run, call: Call) -> list[Layers]:
    """``copy_``: what was there does not matter."""
    target, source = call.args[0], call.args[1]
    return [tuple(layer.expand(target.shape) for layer in run.layers(source))]


def filled(run: Run, call: Call) -> list[Layers]:
    """``fill_`` and ``zero_``: numbers belong to no channel; where a tensor is filled as a whole, its size follows."""
    return [run.layers(call.args[0])]


def batch_norm(run: Run, call: Call) -> list[Layers]:
    """Per channel along axis 1; statistics of the batch must not run over another labelled axis."""
    x = call.args[0]
    own = run.layers(x)
    if _normalises_batch(call):
        for layer in own:
            if set(axes_of(layer)) - {1}:
                run.flag(layer, "mixed", f"{call.where} normalises over its channels")
    operands: list[tuple[Tensor, Layers]] = [(x, own)]
    for t in call.inputs[1:]:
        if t.dim() == 1:
            shape = [1, -1, *[1] * (x.dim() - 2)]
            operands.append((t.view(shape), tuple(on_axis(v, 1, t.view(shape).shape) for v in run.layers(t))))
    return [run.combine(operands, x.shape, call.where)]


def _normalises_batch(call: Call) -> bool:
    flags = [a for a in call.args if isinstance(a, bool)]
    return flags[0] if flags else call.name in ("_native_batch_norm_legit", "batch_norm_with_update")


# in newer versions of torch most entrywise operations are tagged as such; these are not
_ENTRYWISE = (
    "_prelu_kernel",
    "prelu",
    "hardswish",
    "log_sigmoid_forward",
    "rsub",
    "native_dropout",
    "polar",
    "complex",
)
_UNARY = ("rrelu_with_noise", "bernoulli")
_LIKE = (
    *("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"),
    *("new_zeros", "new_ones", "new_empty", "new_full", "new_empty_strided"),
)
_BATCH_NORMS = (
    *("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm", "_batch_norm_no_update", "batch_norm_with_update"),
    *("_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "_batch_norm_impl_index"),
)

RULES = {
    **dict.fromkeys(_ENTRYWISE, pointwise),
    **dict.fromkeys(_UNARY, unary),
    **dict.fromkeys(_LIKE, same_shape),
    **dict.fromkeys(_BATCH_NORMS, batch_norm),
    "copy": written,
    "fill": filled,
    "zero": filled,
}
