"""Which tensors of a pruned network can be compared with those of the dense one, and how far they are from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..core.batches import tensors_in
from ..maths.distillation import distillation_loss, feature_loss

__all__ = ["common_features", "feature_losses", "kept_channels", "named_layers", "output_loss", "recorded"]

MOST = 16
"""Features that are compared at most, spread evenly."""
ALIKE = 0.5
"""Correlation from which on a channel counts as one of the dense network."""


def named_layers(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """Modules by name; ``ValueError`` for names that the network lacks."""
    known = dict(model.named_modules())
    missing = [name for name in names if name not in known]
    if missing or isinstance(names, str):
        raise ValueError(
            f"features={names!r} must be a list of layer names of {type(model).__name__}; unknown: {missing}; see "
            "dict(model.named_modules())"
        )
    return {name: known[name] for name in names}


@contextmanager
def recorded(model: nn.Module, names: Sequence[str], outputs: dict[str, Tensor]) -> Iterator[None]:
    """Note the outputs of layers in ``outputs``, which is empty again afterwards."""

    def note(name: str, output: Any) -> None:
        if not isinstance(output, Tensor):
            raise TypeError(f"feature {name!r} puts out a {type(output).__name__}; name layers that give one tensor")
        outputs[name] = output.clone()  # the next layer may work in place

    handles = [
        layer.register_forward_hook(lambda _layer, _args, output, name=name: note(name, output))
        for name, layer in named_layers(model, names).items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        outputs.clear()


@torch.no_grad()
def common_features(dense: nn.Module, pruned: nn.Module, run: Callable[[nn.Module], Any]) -> dict[str, Tensor | None]:
    """Modules of several layers, such as blocks, whose outputs can be compared in both networks, and which differ.

    They have the same shape in both, or the pruned network has fewer channels of which each belongs to one of the dense
    network, in the same order, as their values tell. Where there are none, single layers. What is the output of the
    network itself is none of them. Of modules that put out the same tensor one is named.

    Args:
        dense: the network before pruning.
        pruned: the network.
        run: runs one of them, always on the same batch.

    Returns:
        Per name, in the order in which they run, the channels of the dense network that are left, ``None`` for all.
    """
    seen = []
    for model in (dense, pruned):
        calls: dict[str, list[Any]] = {}
        with ExitStack() as stack:
            for name, module in model.named_modules():
                if name:
                    note = _noting(calls, name)
                    stack.callback(module.register_forward_hook(note).remove)
            output = run(model)
        seen.append((calls, {_place(t) for t in tensors_in(output)}))
    (theirs, _), (ours, ends) = seen
    found: dict[Any, str] = {}
    channels: dict[str, Tensor | None] = {}
    for name, values in ours.items():
        there = theirs.get(name, [])
        if len(values) != 1 or len(there) != 1 or not all(isinstance(t, Tensor) for t in (*values, *there)):
            continue
        x, y = values[0], there[0]
        if x.dim() < 3 or not x.is_floating_point() or _place(x) in ends:
            continue
        if x.shape == y.shape:
            if torch.equal(x, y.to(x)):
                continue
            channels[name] = None
        elif (left := kept_channels(x, y)) is not None:
            channels[name] = left
        else:
            continue
        found[_place(x)] = name
    names = list(found.values())
    blocks = [name for name in names if next(pruned.get_submodule(name).children(), None) is not None]
    chosen = blocks or names
    if len(chosen) > MOST:
        chosen = [chosen[i * (len(chosen) - 1) // (MOST - 1)] for i in range(MOST)]
    return {name: channels[name] for name in chosen}


def kept_channels(pruned: Tensor, dense: Tensor) -> Tensor | None:
    """Channels of a tensor that are left in another one, by their correlation; ``None`` if that does not tell.

    Args:
        pruned: shape (N, C', ...) of images and signals, (N, T, C') of tokens.
        dense: the same with C channels.

    Returns:
        Ascending positions, shape (C',).

    Example:
        >>> x = torch.randn(4, 6, 5, 5)
        >>> kept_channels(x[:, [0, 2, 5]] + 0.1, x).tolist(), kept_channels(x[:, [2, 0]], x)
        ([0, 2, 5], None)
    """
    axis = channel_axis(pruned, dense)
    if axis is None or pruned.shape[axis] > dense.shape[axis]:
        return None
    rows = [x.float().movedim(axis, 0).flatten(1) for x in (pruned, dense.to(pruned.device))]
    p, d = (nn.functional.normalize(x - x.mean(1, keepdim=True), dim=1) for x in rows)
    likeness, at = (p @ d.mT).max(1)
    alike = bool((likeness > ALIKE).all()) and bool((at.diff() > 0).all())
    return at if alike else None


def channel_axis(pruned: Tensor, dense: Tensor) -> int | None:
    """Where the channels of a feature are: behind the samples for images and signals, last for tokens.

    Two shapes tell, as they differ there and nowhere else; ``None`` if they do not tell.

    Example:
        >>> channel_axis(torch.zeros(2, 3, 9), torch.zeros(2, 4, 9)), channel_axis(torch.ones(2, 9), torch.ones(3, 9))
        (1, None)
    """
    if pruned.dim() != dense.dim():
        return None
    differ = [i for i, (a, b) in enumerate(zip(pruned.shape, dense.shape, strict=True)) if a != b]
    return differ[0] if differ == [1] or (differ == [2] and pruned.dim() == 3) else None


def _noting(calls: dict[str, list[Any]], name: str) -> Callable[..., None]:
    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        calls.setdefault(name, []).append(output)

    return hook


def _place(x: Tensor) -> tuple[Any, ...]:
    return x.data_ptr(), tuple(x.shape), x.stride()


def output_loss(student: Any, teacher: Any, temperature: float, marks: Tensor | None = None) -> Tensor:
    r"""How far all outputs of a network are from those of another.

    The sum over all floating tensors of the relative squared error (:func:`.feature_loss`) and, where a tensor has two
    dimensions and more than one column, so that it may be logits, of :math:`T^2 \mathrm{KL}`
    (:func:`.distillation_loss`).

    Args:
        student: what the network gives.
        teacher: what the other one gives, in the same form.
        temperature: T.
        marks: bool, shape (N, T): tokens that count; outputs of shape (N, T, ...) are compared there.

    Raises:
        ValueError: if there is nothing to compare, or numbers or shapes differ.
    """
    ours, theirs = tensors_in(student), tensors_in(teacher)
    if len(ours) != len(theirs):
        raise ValueError(
            f"the pruned network gives {len(ours)} tensor(s), the dense one {len(theirs)}: they must be the same task, "
            "and of the same class where outputs depend on it"
        )
    pairs = [
        (s, t)
        for s, t in zip(ours, theirs, strict=True)
        if s.is_floating_point() and s.requires_grad | (not torch.is_grad_enabled())
    ]
    if not pairs:
        raise ValueError("the network gives no floating tensor that depends on its weights")
    total = pairs[0][0].new_zeros((), dtype=torch.float32)
    for s, t in pairs:
        if s.shape != t.shape:
            raise ValueError(
                f"the pruned network gives an output of shape {tuple(s.shape)}, the dense one {tuple(t.shape)}: "
                "they must be the same task"
            )
        logits = s.dim() == 2 and s.shape[1] > 1
        if marks is not None and s.shape[:2] == marks.shape:
            s, t, logits = s[marks], t[marks], False
        total = total + feature_loss(s, t)
        if logits:
            total = total + distillation_loss(s, t, temperature=temperature)
    return total


def feature_losses(
    student: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor],
    features: Mapping[str, Tensor | None],
    marks: Tensor | None = None,
) -> Tensor:
    """Mean of :func:`.feature_loss` over the features that ran.

    Args:
        student: outputs of the pruned network, by name.
        teacher: of the dense one.
        features: see :func:`common_features`.
        marks: bool, shape (N, T): tokens that count; features of shape (N, T, C) are compared there.
    """
    losses = []
    for name, left in features.items():
        if name in student and name in teacher:
            x, y = student[name], teacher[name]
            axis = channel_axis(x, y)
            y = y if left is None or axis is None else y.index_select(axis, left.to(y.device))
            if marks is not None and x.dim() == 3 and x.shape[:2] == marks.shape:
                x, y = x[marks], y[marks]
            losses.append(feature_loss(x, y))
    return torch.stack(losses).mean() if losses else torch.zeros((), device="cpu")
