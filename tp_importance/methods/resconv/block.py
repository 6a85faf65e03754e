"""The residual convolution of ResConv (arXiv 2011.14356), which fuses into an ordinary one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoints.checkpoint import register_rebuilt
from ...graph.dataflow import is_batchnorm
from .fusion import fused_kernel

__all__ = ["ResConv2d", "Scale", "replace_module", "resconv_layers"]


class ResConv2d(nn.Module):
    r"""A convolution with a shortcut of its own: :math:`y = s \cdot BN(W * x) + a \cdot x`.

    Args:
        conv: stride 1, as many inputs as outputs, the same size in and out.
        bn: the batch norm behind it, with running statistics, or ``None``.
        s: initial layer scaling factor.
        a: initial information control.

    Attributes:
        s: parameter, shape (1,); L1 drives it to 0 (:meth:`~tp_importance.ResConvPruner.regularize`).
        a: parameter, shape (1,), kept ≥ 0 by the pruner.

    Raises:
        ValueError: if the convolution cannot hold a shortcut, or ``bn`` is no batch norm with running statistics.

    Example:
        >>> layer, x = ResConv2d(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)), torch.randn(2, 4, 8, 8)
        >>> torch.equal(layer(x), layer.bn(layer.conv(x)))
        True

    Source: paper, abstract; the placement after the batch norm is ours: fusible and lossless to remove.
    """

    s: nn.Parameter
    a: nn.Parameter

    def __init__(self, conv: nn.Conv2d, bn: nn.Module | None = None, *, s: float = 1.0, a: float = 0.0) -> None:
        super().__init__()
        problem = conv_problem(conv)
        if problem:
            raise ValueError(f"this convolution cannot hold a shortcut: {problem}")
        if bn is not None and not is_batchnorm(bn):
            raise ValueError(
                f"bn={bn} is no batch norm with running statistics, so it could not be fused; leave it out"
            )
        self.training = conv.training
        self.conv, self.bn = conv, nn.Identity().train(conv.training) if bn is None else bn
        self.s = nn.Parameter(conv.weight.detach().new_full((1,), s))
        self.a = nn.Parameter(conv.weight.detach().new_full((1,), a))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` and the result have shape (N, C, H, W)."""
        s, a = self.s.squeeze(), self.a.squeeze()  # numbers leave the dtype alone that autocast chose
        return s * self.bn(self.conv(x)) + a * x

    def extra_repr(self) -> str:
        """The scalars."""
        return f"s={self.s.item():.4g}, a={self.a.item():.4g}"

    def fused(self) -> nn.Conv2d:
        """The one convolution that computes the same; a new module.

        Raises:
            ValueError: if the batch norm is in train mode.
        """
        conv, bn = self.conv, self.bn
        statistics: dict[str, Any] = {}
        if not isinstance(bn, nn.Identity):
            if bn.training and isinstance(bn, nn.modules.batchnorm._BatchNorm):  # a frozen one is none
                raise ValueError("its batch norm is in train mode, so its statistics change; call model.eval() first")
            statistics = {
                **{"mean": bn.running_mean, "var": bn.running_var, "gamma": bn.weight, "beta": bn.bias},
                "eps": bn.eps,
            }
        kernel, bias = fused_kernel(
            conv.weight, conv.bias, self.s.item(), self.a.item(), groups=conv.groups, **statistics
        )
        result = nn.Conv2d(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            padding=conv.padding,  # type: ignore[arg-type]
            dilation=conv.dilation,  # type: ignore[arg-type]
            groups=conv.groups,
            padding_mode=conv.padding_mode,
            device="meta",  # initialises nothing, draws no random numbers
        )
        result.weight = nn.Parameter(kernel, conv.weight.requires_grad)
        result.bias = nn.Parameter(bias, conv.weight.requires_grad)
        return result.train(self.training)


class Scale(nn.Module):
    """Multiply by one number: what is left of a removed layer whose factor no other layer can take.

    Args:
        factor: the number; kept as a buffer, so it is saved and moves with the model.
        like: a tensor of the device and dtype it shall have.

    Example:
        >>> Scale(0.5)(torch.tensor([2.0])).item()
        1.0
    """

    factor: Tensor

    def __init__(self, factor: float = 1.0, *, like: Tensor | None = None) -> None:
        super().__init__()
        one = torch.ones((), device=torch.get_default_device()) if like is None else like.detach().new_ones(())
        self.register_buffer("factor", one * factor)

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return x * self.factor

    def extra_repr(self) -> str:
        """The factor."""
        return f"factor={self.factor.item():.4g}"


register_rebuilt(Scale)


def conv_problem(conv: nn.Conv2d) -> str | None:
    """Why a convolution cannot hold a shortcut, or ``None`` if it can."""
    kernel, dilation = conv.kernel_size, conv.dilation
    if any(s != 1 for s in conv.stride):
        return f"stride {tuple(conv.stride)} is not 1"
    if conv.in_channels != conv.out_channels:
        return f"{conv.in_channels} inputs and {conv.out_channels} outputs"
    if any(k % 2 == 0 for k in kernel):
        return f"kernel {tuple(kernel)} has no centre"
    if isinstance(conv.padding, str):
        fits = conv.padding == "same" or all(k == 1 for k in kernel)
    else:
        fits = all(2 * p == d * (k - 1) for p, d, k in zip(conv.padding, dilation, kernel, strict=True))
    return None if fits else f"padding {conv.padding} changes the size"


def resconv_layers(model: nn.Module) -> dict[str, ResConv2d]:
    """The residual convolutions of a model, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, ResConv2d)}


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put ``new`` where the module ``name`` is, under every name it has."""
    old = model.get_submodule(name)
    for parent in list(model.modules()):
        for leaf, child in parent._modules.items():
            if child is old:
                parent._modules[leaf] = new
