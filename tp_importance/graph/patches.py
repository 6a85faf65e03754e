"""What a consumer sees: its unfolded input at sampled output positions, and its weight in the same layout."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor, nn

from .layer_kinds import CONV, is_batch_norm
from .layer_pruners import RECURRENT, input_weights

__all__ = [
    "at_positions",
    "bn_gain",
    "consumer_weight",
    "feature_channels",
    "fork",
    "require_batched",
    "sampled_output",
    "samples_first",
    "set_consumer_weight",
    "unfolded_input",
]

EPS = 1e-5
"""What batch norms add to variances if they do not say."""


def unfolded_input(
    module: nn.Module, x: Tensor, out: Tensor, positions: int | None, generator: torch.Generator
) -> Tensor:
    r"""Rows u with ``consumer output = Wᵀu + b`` at sampled output positions.

    Only the sampled patches are gathered: for 8 of 1024 positions this costs a fraction of a full ``unfold``.

    Args:
        module: a convolution (also transposed, grouped, dilated, strided, any padding mode), linear or recurrent layer;
            of the last, the output is what its input adds to the gates.
        x: its input, shape (N, C, \*spatial) or (N, \*, C) for linear.
        out: its output.
        positions: output positions per sample, drawn without the batch's composition in view; ``None``: all.
        generator: CPU generator the positions come from.

    Returns:
        shape (N, Q, G, d): Q positions, G conv groups, d = C/G · taps, channel-major as ``nn.functional.unfold``.
    """
    if isinstance(module, (nn.Linear, *RECURRENT)):
        tokens = x.flatten(1, -2) if x.dim() > 2 else x.unsqueeze(1)
        chosen = _positions(len(x), tokens.shape[1], positions, generator, x.device)
        return tokens.gather(1, chosen.unsqueeze(2).expand(-1, -1, tokens.shape[2])).unsqueeze(2)
    assert isinstance(module, CONV)
    spatial = out.shape[2:]
    chosen = _positions(len(x), math.prod(spatial), positions, generator, x.device)
    left = module._reversed_padding_repeated_twice[0::2][::-1] if not module.transposed else module.padding
    if not module.transposed and module.padding_mode != "zeros":
        x = nn.functional.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
        left = [0] * len(left)
    index, inside = _taps(
        tuple(x.shape[2:]),
        tuple(spatial),
        tuple(module.kernel_size),
        tuple(module.stride),
        tuple(int(v) for v in left),
        tuple(module.dilation),
        module.transposed,
    )
    index, inside = index.to(x.device)[chosen], inside.to(x.device)[chosen]  # (N, Q, taps)
    n, c, (q, taps) = len(x), x.shape[1], index.shape[1:]
    maps = x.flatten(2).unsqueeze(1).expand(-1, q, -1, -1)
    patches = maps.gather(3, index.unsqueeze(2).expand(-1, -1, c, -1))  # (N, Q, C, taps)
    if not bool(inside.all()):
        patches.mul_(inside.unsqueeze(2))
    return patches.view(n, q, module.groups, c // module.groups * taps)


def require_batched(name: str, module: nn.Module, x: Tensor) -> None:
    """Refuse a single sample, which convolutions and linear layers take as well.

    Args:
        name: of the layer.
        module: the layer.
        x: its input.

    Raises:
        ValueError: if it has no batch dimension.
    """
    least = len(module.kernel_size) + 2 if isinstance(module, CONV) else 2 + isinstance(module, nn.RNNBase)
    if isinstance(module, (*CONV, nn.Linear, *RECURRENT)) and x.dim() < least:
        raise ValueError(
            f"layer {name} gets an input of shape {tuple(x.shape)} without a batch dimension: the loader must give "
            "batches, e.g. DataLoader(dataset, batch_size=64) or [(X, Y)]"
        )


def samples_first(module: nn.Module, x: Tensor) -> Tensor:
    """The input of a layer with the samples of the batch on its first axis: recurrent layers may have time there.

    Args:
        module: the layer.
        x: its input.
    """
    return x.transpose(0, 1) if isinstance(module, nn.RNNBase) and not module.batch_first and x.dim() > 2 else x


def sampled_output(module: nn.Module, out: Tensor, positions: int | None, generator: torch.Generator) -> Tensor:
    """An output of ``module``, or a tensor of its shape, at the positions :func:`unfolded_input` draws; (N, Q, O)."""
    rows = out.unsqueeze(1) if out.dim() == 2 else out.flatten(1, -2)
    if not isinstance(module, nn.Linear):
        rows = out.flatten(2).mT
    chosen = _positions(len(out), rows.shape[1], positions, generator, out.device)
    return rows.gather(1, chosen.unsqueeze(2).expand(-1, -1, rows.shape[2]))


def at_positions(values: Tensor, positions: int | None, generator: torch.Generator) -> Tensor:
    """Values of all output positions, (N, L), at those :func:`unfolded_input` draws; shape (N, Q).

    Args:
        values: one per position.
        positions: see :func:`unfolded_input`.
        generator: see :func:`unfolded_input`.
    """
    return values.gather(1, _positions(len(values), values.shape[1], positions, generator, values.device))


def fork(generator: torch.Generator) -> torch.Generator:
    """A generator that draws what this one is about to draw."""
    return torch.Generator().set_state(generator.get_state())


def _positions(n: int, total: int, wanted: int | None, generator: torch.Generator, device: torch.device) -> Tensor:
    if wanted is None or wanted >= total:
        return torch.arange(total, device=device).expand(n, total)
    return torch.randint(total, (n, wanted), generator=generator, device="cpu").to(device)


@lru_cache(maxsize=256)
def _taps(
    in_shape: tuple[int, ...],
    out_shape: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    left: tuple[int, ...],
    dilation: tuple[int, ...],
    transposed: bool,
) -> tuple[Tensor, Tensor]:
    """Flat input index and validity of every (output position, tap); shapes (L, taps)."""
    index, inside = torch.zeros(1, 1, dtype=torch.int64, device="cpu"), torch.ones(1, 1, dtype=torch.bool, device="cpu")
    for size, out, k, s, p, d in zip(in_shape, out_shape, kernel, stride, left, dilation, strict=True):
        q, t = torch.arange(out, device="cpu").view(-1, 1), torch.arange(k, device="cpu").view(1, -1) * d
        at = q + p - t if transposed else q * s - p + t
        valid = (at >= 0) & (at % s == 0) if transposed else at >= 0
        at = at // s if transposed else at
        valid = valid & (at < size)
        at = at.clamp(0, size - 1)
        index = (index[:, None, :, None] * size + at[None, :, None, :]).flatten(2).flatten(0, 1)
        inside = (inside[:, None, :, None] & valid[None, :, None, :]).flatten(2).flatten(0, 1)
    return index, inside


def consumer_weight(module: nn.Module, weight: Tensor | None = None) -> Tensor:
    """Weight per conv group, shape (G, O/G, d), features in the layout of :func:`unfolded_input`.

    Args:
        module: convolution, linear or recurrent layer; of the last, what it multiplies its input with.
        weight: another tensor in the shape of its weight, to be seen in this layout.
    """
    if isinstance(module, RECURRENT):
        return torch.cat([getattr(module, name).detach() for name in input_weights(module)]).unsqueeze(0)
    assert isinstance(module, (*CONV, nn.Linear))
    weight = module.weight.detach() if weight is None else weight
    if isinstance(module, nn.Linear):
        return weight.unsqueeze(0)
    w = weight.flatten(2)
    if not module.transposed:
        return w.reshape(module.groups, module.out_channels // module.groups, -1)
    w = w.reshape(module.groups, module.in_channels // module.groups, module.out_channels // module.groups, -1)
    return w.transpose(1, 2).flatten(2)


@torch.no_grad()
def set_consumer_weight(module: nn.Module, weight: Tensor) -> None:
    """Write a weight in the layout of :func:`consumer_weight`, shape (G, O/G, d), into the layer, in its precision."""
    if isinstance(module, CONV) and module.transposed:
        groups, outputs = weight.shape[:2]
        weight = weight.view(groups, outputs, module.in_channels // groups, -1).transpose(1, 2)
    target = module.weight
    assert isinstance(target, Tensor)
    target.copy_(weight.reshape(target.shape))


def feature_channels(module: nn.Module) -> Tensor:
    """Input channel every feature belongs to, shape (G, d), int64."""
    if isinstance(module, nn.Linear):
        return torch.arange(module.in_features, device="cpu").unsqueeze(0)
    if isinstance(module, RECURRENT):
        return torch.arange(int(module.input_size), device="cpu").unsqueeze(0)
    assert isinstance(module, CONV)
    taps = math.prod(module.kernel_size)
    return torch.arange(module.in_channels, device="cpu").repeat_interleave(taps).view(module.groups, -1)


def bn_gain(batch_norm: nn.Module | None, outputs: int) -> Tensor:
    r"""Gain :math:`g_o = \gamma_o/\sqrt{\sigma_o^2+\epsilon}` of the batch norm behind a layer, ones without; (O,)."""
    if batch_norm is None or not is_batch_norm(batch_norm) or not isinstance(batch_norm.running_var, Tensor):
        return torch.ones(outputs, device="cpu")
    gain = (batch_norm.running_var.detach().double() + getattr(batch_norm, "eps", EPS)).rsqrt()
    return gain * batch_norm.weight.detach().double() if isinstance(batch_norm.weight, Tensor) else gain
