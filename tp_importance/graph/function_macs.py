"""Multiply-accumulates of torch's functions, from their arguments and what they return."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.batches import tensors_in

__all__ = [
    "FORMULAS",
    "KERNELS",
    "PRODUCTS",
    "RECURRENT",
    "UNKNOWN",
    "WEIGHTS",
    "attention_products",
    "positional",
    "sums",
    "sums_over_last",
]

Macs = Callable[..., int]

_ADDED = ("addmm", "addmv", "baddbmm")
"""Products that are added to the first argument."""


def _conv(out: Tensor, _input: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return out.numel() * weight[0].numel()


def _conv_transpose(_out: Tensor, input: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return input.numel() * weight[0].numel()


def _linear(out: Tensor, _input: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return out.numel() * weight.shape[-1]


def _product(out: Tensor, left: Tensor, *_: Any, **__: Any) -> int:
    return out.numel() * left.shape[-1]


def _product_from_right(out: Tensor, _right: Tensor, left: Tensor, **__: Any) -> int:
    return out.numel() * left.shape[-1]


def _sum_and_product(out: Tensor, _added: Tensor, left: Tensor, *_: Any, **__: Any) -> int:
    return out.numel() * left.shape[-1]


def _contraction(out: Tensor, left: Tensor, right: Tensor, *_: Any, **__: Any) -> int:
    return out.numel() * math.isqrt(left.numel() * right.numel() // max(out.numel(), 1))


def _einsum(_out: Tensor, equation: str, *operands: Any, **__: Any) -> int:
    """The product of the sizes of all indices, for two operands; more are multiplied two at a time, from the left."""
    given = tensors_in(operands)
    terms, arrow, result = equation.replace(" ", "").partition("->")
    sizes: dict[str, int] = {}
    letters = [_letters(term, tensor, sizes) for term, tensor in zip(terms.split(","), given, strict=True)]
    if len(given) == 2:
        return math.prod(sizes.values())
    if not arrow or "." in equation or torch.backends.opt_einsum.is_available():  # which asks for a path
        raise NotImplementedError
    total, left = 0, letters[0]
    for i, right in enumerate(letters[1:], 1):
        later = set(result).union(*letters[i + 1 :])
        if (left & right) - later:  # else they are multiplied entry by entry
            total += math.prod(sizes[c] for c in (left & right) | ((left | right) & later))
        left = (left | right) & later
    return total


def _letters(term: str, tensor: Tensor, sizes: dict[str, int]) -> set[str]:
    """The indices of one operand; their sizes are noted."""
    front, _, back = term.partition("...") if "..." in term else (term, "", "")
    inner = tensor.shape[len(front) : tensor.dim() - len(back)]
    shape = [*tensor.shape[: len(front)], *tensor.shape[tensor.dim() - len(back) :]]
    places = [f".{i}" for i in range(len(inner), 0, -1)]  # counted from the right, as they are broadcast
    letters = [*front, *back, *places]
    for letter, size in zip(letters, [*shape, *inner], strict=True):
        sizes[letter] = max(size, sizes.get(letter, 1))
    return set(letters)


def _bilinear(out: Tensor, _left: Tensor, _right: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return out.numel() * weight[0].numel()


def _recurrent(_out: Tensor, input: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    """One of the weights: each is multiplied with once per time step of every sequence."""
    return input.numel() // max(input.shape[-1], 1) * weight.numel()


def _attention(_out: Tensor, query: Tensor, key: Tensor, value: Tensor, width: int, *_: Any, **__: Any) -> int:
    """The four projections, as for ``nn.MultiheadAttention``."""
    return (2 * query.numel() + key.numel() + value.numel()) * width


def _scaled_dot_products(out: Tensor, query: Tensor, key: Tensor, *_: Any, **__: Any) -> int:
    """QKᵀ and the sum of values, for all pairs of positions, whether a mask leaves them out or not."""
    rows = out.numel() // max(out.shape[-1], 1)
    return rows * key.shape[-2] * (query.shape[-1] + out.shape[-1])


def attention_products(query: Tensor, key: Tensor, width: int, *, batch_first: bool = False) -> int:
    """QKᵀ and AV of multi-head attention of some width.

    Args:
        query: (positions, batch, width), or the first two the other way round, or without a batch.
        key: likewise.
        width: of all heads.
        batch_first: whether the batch comes before positions.
    """
    positions = key.shape[int(batch_first and key.dim() == 3)]
    return 2 * query.numel() // max(query.shape[-1], 1) * positions * width


RECURRENT = {f"{kind}{cell}" for kind in ("lstm", "gru", "rnn_tanh", "rnn_relu") for cell in ("", "_cell")}
"""Functions that multiply with several weights; their formula is for one of them, in place of all but the input."""

FORMULAS: dict[str, Macs] = {
    **{f"conv{n}d": _conv for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": _conv_transpose for n in (1, 2, 3)},
    "deform_conv2d": _conv,
    "linear": _linear,
    **dict.fromkeys(("matmul", "mm", "bmm", "mv", "dot", "vdot"), _product),
    "rmatmul": _product_from_right,
    **dict.fromkeys(_ADDED, _sum_and_product),
    **dict.fromkeys(("tensordot", "inner"), _contraction),
    "einsum": _einsum,
    "bilinear": _bilinear,
    **dict.fromkeys(RECURRENT, _recurrent),
    "multi_head_attention_forward": _attention,
}
"""Formula ``(output, *arguments) → multiply-accumulates`` per function."""

PRODUCTS: dict[str, Macs] = {
    **dict.fromkeys(("matmul", "mm", "bmm", "mv", "dot", "vdot"), _product),
    "rmatmul": _product_from_right,
    **dict.fromkeys(_ADDED, _sum_and_product),
    **dict.fromkeys(("tensordot", "inner"), _contraction),
    "einsum": _einsum,
    "scaled_dot_product_attention": _scaled_dot_products,
}
"""The same for products of data with data."""

UNKNOWN = {"addbmm", "cdist", "chain_matmul", "multi_dot", "conv_tbc", "embedding_bag", "solve", "lstsq", "kron"}
"""Functions of torch that multiply and accumulate, and of which we do not say how often."""

WEIGHTS: dict[str, slice] = {
    **{f"conv{n}d": slice(1, 2) for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": slice(1, 2) for n in (1, 2, 3)},
    **dict.fromkeys(("linear", "deform_conv2d"), slice(1, 2)),
    **dict.fromkeys(_ADDED, slice(1, 3)),
    "bilinear": slice(2, 3),
}
"""Which arguments may be the weight, where a bias stands beside it."""

KERNELS = WEIGHTS.keys() - set(_ADDED)
"""Functions of which one argument is meant to be a weight: one made of data is no product of data with data."""


def sums(equation: Any) -> bool:
    """Whether an einsum of two operands sums over anything; else it is an outer product, or works entry by entry."""
    terms, arrow, result = str(equation).replace(" ", "").partition("->")
    letters = [c for c in terms if c.isalpha()]
    return any(letters.count(c) > 1 and c not in result for c in letters) if arrow else len(letters) > len({*letters})


def sums_over_last(name: str, operands: Sequence[Any], is_weight: Callable[[Tensor], bool]) -> bool:
    """Whether a product sums over the last axes of the data, as a linear layer does.

    Products along other axes run once per channel: their number changes when channels of other layers go.
    """
    if name in ("matmul", "mm", "bmm", "mv", "dot", "vdot", "rmatmul", *_ADDED):
        left, right = operands[1:3] if name in _ADDED else operands[:2]
        if name == "rmatmul":
            left, right = right, left
        return right.dim() == 1 or is_weight(right)
    if name == "tensordot":
        data, _, dims = operands
        if is_weight(data):
            return False
        last = data.dim()
        axes = list(range(last - dims, last)) if isinstance(dims, int) else [axis % last for axis in dims[0]]
        return sorted(axes) == list(range(last - len(axes), last))
    if name == "einsum":
        terms, arrow, result = operands[0].replace(" ", "").partition("->")
        (term, other), (first, second) = terms.split(","), _operands_of(operands)
        if is_weight(first):
            term, other, first, second = other, term, second, first
        summed = {letter for letter in term if letter in other and letter not in result and letter != "."}
        return bool(arrow) and is_weight(second) and set(term[len(term) - len(summed) :]) == summed
    return True


def _operands_of(operands: Sequence[Any]) -> list[Tensor]:
    """The two tensors of an einsum, given one by one or in a list."""
    given = operands[1:]
    found = list(given[0]) if len(given) == 1 and isinstance(given[0], (list, tuple)) else list(given)
    if len(found) != 2:
        raise NotImplementedError
    return found


def positional(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments in the order of the formulas, also if given by keyword."""
    known: dict[str, tuple[str, ...]] = {
        "linear": ("input", "weight"),
        "bilinear": ("input1", "input2", "weight"),
        "tensordot": ("a", "b", "dims"),
        "multi_head_attention_forward": ("query", "key", "value", "embed_dim_to_check"),
        **dict.fromkeys((f"conv{n}d" for n in (1, 2, 3)), ("input", "weight")),
        **dict.fromkeys((f"conv_transpose{n}d" for n in (1, 2, 3)), ("input", "weight")),
    }
    names = known.get(name)
    if names is None:
        return [*args, *kwargs.values()]
    return [*args, *(kwargs[key] for key in names[len(args) :] if key in kwargs)]
