"""Labels through operations that sum over axes: reductions, softmax, norms over channels, pooling."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from torch import Tensor

from .calls import Call, Layers, Run
from .contractions import labels_along, match_products
from .elementwise import batch_norm
from .layers import along, axes_of, compact, merged, tight

__all__ = ["RULES"]


def reduction(run: Run, call: Call) -> list[Layers]:
    """Over axes without labels they stay; see :func:`fold`."""
    x, out = call.inputs[0], call.outputs[0]
    dims = _dims(call, x.dim())
    kept = []
    for layer in run.layers(x):
        over = set(axes_of(layer)) & set(dims)
        if over == set(axes_of(layer)) and _normalises(run, call, x, layer, over) and len({*dims}) < x.dim():
            continue
        folded = fold(run, layer, dims, call.where)
        if folded is None:
            continue
        if out.dim() != x.dim():
            for axis in sorted(dims, reverse=True):
                folded = folded.select(axis, 0)
        kept.append(folded.expand(out.shape))
    return [tuple(kept)] * len(call.outputs)


def _normalises(run: Run, call: Call, x: Tensor, layer: Tensor, axes: Iterable[int]) -> bool:
    """Whether an operation takes a mean, a variance or a norm of activations over one axis of channels.

    Where it does, it can do so over the channels that are kept. Computed weights are another matter: what is divided by
    its own mean belongs to other channels. Learned tokens are activations, too, if it is a whole norm that sees them.
    """
    axes = list(axes)
    found = call.name in _STATISTICS and len(axes) == 1 and run.statistic(x, layer, axes[0])
    if found and _divides_by_one_less(call) and x.shape[axes[0]] == call.inputs[0].numel() // call.outputs[0].numel():
        run.ledger.several.append(compact(layer).unique().cpu().numpy())  # of a single channel it is not a number
    return found


def _divides_by_one_less(call: Call) -> bool:
    """Whether a variance is divided by one less than the number of entries."""
    names = [a.name for a in call.func._schema.arguments]
    if "unbiased" in names:
        return bool(call.argument(names.index("unbiased"), "unbiased", True))
    return "correction" in names and call.kwargs.get("correction", 1) in (None, 1)


def fold(run: Run, layer: Tensor, dims: Iterable[int], where: str) -> Tensor | None:
    """A layer with the axes ``dims`` reduced to one entry: labels that coincide there are tied.

    Where no other axis has labels, all channels are mixed, and nothing is left.
    """
    axes = set(axes_of(layer))
    over = [d for d in dims if d in axes]
    if over and not axes - set(over):
        one = "makes one number of all its channels (to decide about a branch?)"
        run.flag(layer, "mixed", f"{where} {one if len({*dims}) == layer.dim() else 'mixes its channels'}")
        return None
    for axis in over:
        layer, pairs = merged(layer, axis)
        run.ledger.tie(pairs)
    for axis in dims:
        layer = layer.narrow(axis, 0, 1)
    return layer


def _dims(call: Call, n: int) -> list[int]:
    given: Any = call.kwargs.get("dim", call.args[_DIM_AT.get(call.name, 1)] if _has_dim(call) else None)
    if given is None or given == []:
        return list(range(n))
    return [d % n for d in ([given] if isinstance(given, int) else given)] if n else []


_DIM_AT = {"norm": 2, "linalg_vector_norm": 2}


def _has_dim(call: Call) -> bool:
    at = _DIM_AT.get(call.name, 1)
    names = [a.name for a in call.func._schema.arguments]
    return len(call.args) > at and names[at] == "dim"


def along_axis(run: Run, call: Call) -> list[Layers]:
    """Softmax, cumulative sums, sorting: every entry along the axis may depend on every other."""
    x = call.inputs[0]
    at = next((a for a in call.func._schema.arguments if a.name == "dim"), None)
    dim = call.kwargs.get("dim", -1)
    if at is not None:
        position = [a.name for a in call.func._schema.arguments].index("dim")
        dim = call.argument(position, "dim", at.default_value if at.default_value is not None else -1)
    kept = []
    for layer in run.layers(x):
        shape = layer.shape
        folded = fold(run, layer, [dim % x.dim()], call.where)
        if folded is not None and call.outputs[0].dim() == x.dim():
            kept.append(
                folded.expand([*shape[: dim % x.dim()], call.outputs[0].shape[dim], *shape[dim % x.dim() + 1 :]])
            )
    return [tuple(kept)] * len(call.outputs)


def over_last(run: Run, call: Call) -> list[Layers]:
    """Layer norm and RMS norm: a channel that goes changes the others, which are normalised by what is left."""
    x = call.args[0]
    normalised = set(range(x.dim() - len(call.args[1]), x.dim()))
    own = run.layers(x)
    for layer in own:
        axes = set(axes_of(layer))
        if axes & normalised and not _normalises(run, call, x, layer, axes & normalised):
            run.flag(layer, "mixed", f"{call.where} normalises over its channels")
        elif axes & normalised:
            run.follow(along(layer, max(axes))[0])
    return [run.combine([(t, run.layers(t)) for t in call.inputs], x.shape, call.where)]


def group_norm(run: Run, call: Call) -> list[Layers]:
    """Every channel of a norm group changes the others: one of each group goes, or whole groups do."""
    x, groups = call.args[0], call.args[6]
    if groups < x.shape[1]:
        for layer in run.layers(x):
            if axes_of(layer) == (1,) and run.statistic(x, layer, 1, groups):
                run.norm_groups(compact(layer).flatten().view(groups, -1), call)
            elif 1 in axes_of(layer):
                run.flag(layer, "mixed", f"{call.where} normalises over its channels")
    else:  # as many groups as channels: their number follows, where a module keeps it
        for layer in run.layers(x):
            if axes_of(layer) == (1,):
                run.follow(compact(layer).flatten())
    return batch_norm(run, call)


def pooling(run: Run, call: Call) -> list[Layers]:
    """Windows of pixels: labels of a channel must not vary over them."""
    x, out = call.inputs[0], call.outputs[0]
    found = re.search(r"(\d)d", call.name)
    n = int(found.group(1)) if found else x.dim() - 2
    spatial = range(x.dim() - n, x.dim())
    kept = []
    for layer in run.layers(x):
        folded = fold(run, layer, spatial, call.where)
        if folded is not None:
            kept.append(folded.expand(out.shape))
    return [tuple(kept)] * len(call.outputs)


def attention(run: Run, call: Call) -> list[Layers]:
    """Scaled dot products: queries and keys are compared by all their channels, values are weighted sums.

    Heads of queries, keys, values and of a mask go together. Where the scale is not given, it is that of the dimensions
    that are left: the queries make up for it.
    """
    shape = call.outputs[0].shape
    given = [_for_every_head(t, run.layers(t), shape) for t in call.args[:3]]
    (query, of_query), (key, of_key), (value, of_value) = given
    scaled: Literal["yes", "no"] = "yes" if call.kwargs.get("scale") is None else "no"
    of_query, of_key, of_value = (
        tuple(v for v in layers if run.attend(v, (-1,), call.where, queries=asked))
        for layers, asked in ((of_query, scaled), (of_key, "no"), (of_value, "no"))
    )
    given = [(query, of_query), (key, of_key), (value, of_value)]
    heads: list[tuple[Tensor, Layers]] = [(tensor, _of_heads(layers, shape)) for tensor, layers in given]
    fronts = [labels_along(of_query, k) for k in range(query.dim() - 2)]
    pairs = shape[:-1].numel() * key.shape[-2]
    run.ledger.count(pairs * query.shape[-1], [*fronts, labels_along(of_query, query.dim() - 1)])
    run.ledger.count(pairs * value.shape[-1], [*fronts, labels_along(of_value, value.dim() - 1)])
    compared = [[v for v in layers if query.dim() - 1 in axes_of(v)] for layers in (of_query, of_key)]
    if query.shape[-1] > 1:
        match_products(run, query, key.mT, compared[0], [v.mT for v in compared[1]], call.where)
    for mask in [t for t in call.inputs if all(t is not u for u in call.args[:3])]:
        heads.append((mask, _of_heads(run.layers(mask), shape)))
    kept = list(run.combine(heads, shape, call.where))
    for layer in of_value:
        axes = set(axes_of(layer))
        if value.dim() - 2 in axes:
            run.flag(layer, "mixed", f"{call.where} mixes its channels")
        elif value.dim() - 1 in axes:
            kept.append(compact(layer).expand(shape))
    return [tuple(kept)]


def _for_every_head(tensor: Tensor, layers: Layers, shape: Sequence[int]) -> tuple[Tensor, Layers]:
    """Keys and values that several heads of queries share, once for each of them."""
    if tensor.dim() < 3 or tensor.shape[-3] == shape[-3]:
        return tensor, layers
    times = shape[-3] // tensor.shape[-3]
    repeated = (tight(layer.repeat_interleave(times, -3)) for layer in layers)
    return tensor.repeat_interleave(times, -3), tuple(v for v in repeated if v is not None)


def _of_heads(layers: Layers, shape: Sequence[int]) -> Layers:
    """Those that vary along the axes in front alone, for a tensor of another number of positions and dimensions."""
    front = [v for v in layers if max(axes_of(v), default=-1) < v.dim() - 2]
    return tuple(v.narrow(-1, 0, 1).narrow(-2, 0, 1).expand(tuple(shape)) for v in front)


def weight_norm(run: Run, call: Call) -> list[Layers]:
    """A filter is divided by its norm: an input that goes changes every filter."""
    v, g, dim = call.args[0], call.args[1], call.argument(2, "dim", 0)
    kept: Layers = ()
    for layer in run.layers(v):
        if dim in axes_of(layer):
            kept = (layer,)
        else:
            run.flag(layer, "mixed", f"{call.where} divides filters by their norm")
    return [run.combine([(v, kept), (g, run.layers(g))], v.shape, call.where)]


_STATISTICS = (
    *("mean", "var", "std", "var_mean", "std_mean", "norm", "linalg_vector_norm"),
    *("native_layer_norm", "_fused_rms_norm", "rms_norm"),
)
_REDUCTIONS = (
    *("mean", "sum", "amax", "amin", "max", "min", "prod", "std", "var", "var_mean", "std_mean", "norm", "all", "any"),
    *("linalg_vector_norm", "logsumexp", "argmax", "argmin", "median", "nansum", "aminmax"),
)
_ALONG = ("_softmax", "_safe_softmax", "_log_softmax", "cumsum", "cumprod", "sort", "topk", "argsort", "kthvalue")
_POOLS = (
    *(f"{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for n in (1, 2, 3)),
    *(f"_adaptive_avg_pool{n}d" for n in (2, 3)),
    *(f"max_pool{n}d_with_indices" for n in (2, 3)),
    *(f"upsample_{kind}" for kind in ("nearest1d", "nearest2d", "nearest3d", "linear1d", "bilinear2d", "bicubic2d")),
    *("upsample_trilinear3d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "grid_sampler_2d"),
    *("_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d"),
)
_ATTENTION = (
    *("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention"),
    *("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention", "scaled_dot_product_attention"),
    *("_scaled_dot_product_attention_math", "_scaled_dot_product_fused_attention_overrideable"),
)

RULES = {
    **dict.fromkeys(_REDUCTIONS, reduction),
    **dict.fromkeys(_ALONG, along_axis),
    **dict.fromkeys(("native_layer_norm", "_fused_rms_norm", "rms_norm"), over_last),
    **dict.fromkeys(_POOLS, pooling),
    **dict.fromkeys(_ATTENTION, attention),
    "native_group_norm": group_norm,
    "_weight_norm_interface": weight_norm,
}
