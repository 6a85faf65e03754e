"""Statistics of batch normalisation: pooled moments, and old statistics moved by the change a pruning makes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ChannelMoments", "PooledMoments", "follow_change"]

CONSTANT = 1e-4
"""A variance below this fraction of the stored one says nothing about scale: the images do not excite the channel."""


@dataclass(frozen=True)
class ChannelMoments:
    """Count, mean and centred sum of squares M₂ = Σ(x − mean)² per channel.

    Attributes:
        count: number of elements n per channel.
        mean: float64, shape (C,).
        m2: float64, shape (C,).

    Example:
        >>> a, b = torch.randn(5, 3, 4, 4), torch.randn(2, 3, 4, 4)
        >>> pooled = ChannelMoments.of(a).merged(ChannelMoments.of(b))
        >>> torch.allclose(pooled.variance, torch.cat([a, b]).double().var((0, 2, 3)))
        True
    """

    count: int
    mean: Tensor
    m2: Tensor

    @classmethod
    def of(cls, x: Tensor) -> ChannelMoments:
        """ChannelMoments of a batch ``x`` of shape (B, C, ...).

        Sums over one sample are taken in the precision of ``x``, about the mean of its channel, and added up in
        float64: several times as fast as all in float64, which has to copy the batch, and as exact as ``x`` is.
        """
        wide = torch.float32 if x.device.type == "mps" else torch.float64  # MPS has no float64
        x = x.detach().flatten(2) if x.dim() > 2 else x.detach().unsqueeze(2)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        n = x.shape[0] * x.shape[2]
        about = x.mean(2).to(wide).mean(0).to(x)
        x = x - about.view(1, -1, 1)
        off = x.sum(2).to(wide).sum(0)
        m2 = torch.linalg.vector_norm(x, dim=2).to(wide).square().sum(0) - off.square() / n
        return cls(n, about.to(wide) + off / n, m2.clamp_min(0))

    def merged(self, other: ChannelMoments) -> ChannelMoments:
        """ChannelMoments of both samples together, without cancellation.

        With n = n₁ + n₂ and δ = mean₂ − mean₁: mean = mean₁ + δ n₂/n and M₂ = M₂,₁ + M₂,₂ + δ² n₁ n₂/n
        (Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances").

        Args:
            other: moments of the second sample.

        Returns:
            The pooled moments; every element weighs the same.
        """
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        return ChannelMoments(count, mean, self.m2 + other.m2 + delta.square() * (self.count * other.count / count))

    def take(self, channels: Tensor) -> ChannelMoments:
        """ChannelMoments of some of the channels, given by their positions, shape (C',)."""
        channels = channels.to(self.mean.device)
        return ChannelMoments(self.count, self.mean[channels], self.m2[channels])

    @property
    def variance(self) -> Tensor:
        """Unbiased variance M₂ / (n − 1), shape (C,)."""
        return self.m2 / (self.count - 1)


class PooledMoments(dict[str, ChannelMoments]):
    """Moments per layer, pooled over everything that was added.

    Example:
        >>> a, b, pooled = torch.randn(5, 3), torch.randn(2, 3), PooledMoments()
        >>> for x in (a, b):
        ...     pooled.add("fc", ChannelMoments.of(x))
        >>> torch.allclose(pooled["fc"].mean, torch.cat([a, b]).double().mean(0))
        True
    """

    def add(self, name: str, moments: ChannelMoments) -> None:
        """Pool ``moments`` with those of the layer ``name`` so far."""
        self[name] = self[name].merged(moments) if name in self else moments


def follow_change(mean: Tensor, var: Tensor, dense: ChannelMoments, pruned: ChannelMoments) -> tuple[Tensor, Tensor]:
    r"""Stored statistics (μ, σ²) of a dense network, moved by what pruning changed on the same images.

    With m, v the mean and variance of a channel on the images, d of the dense and p of the pruned network,

    .. math:: \mu' = m_p + r(\mu - m_d), \qquad \sigma'^2 = r^2 \sigma^2, \qquad r^2 = v_p / v_d

    which is exact if pruning shifts and scales the channel. What training saw and a few images do not show, μ − m_d
    and σ²/v_d, stays. Two such moves one after the other are the one from the first to the last network. There is no
    ratio to go by for a channel that the images hardly excite in the dense network (:math:`v_d` below 10⁻⁴ σ²), or that
    pruning has made all but constant (:math:`v_p` below 10⁻⁴ v_d): r = 1, and in the first case the variance becomes
    σ² + v_p.

    Args:
        mean: μ, shape (C,).
        var: σ², shape (C,).
        dense: moments of the dense network.
        pruned: moments of the pruned network on the same batches.

    Returns:
        New mean and variance, float64, shape (C,). Ours.

    Example:
        >>> x = torch.randn(500, 2, dtype=torch.float64)
        >>> mu, var = torch.tensor([0.3, -0.2]), torch.tensor([1.2, 0.9])
        >>> new_mean, new_var = follow_change(mu, var, ChannelMoments.of(x), ChannelMoments.of(2 * x + 1))
        >>> torch.allclose(new_mean, 2 * mu.double() + 1), torch.allclose(new_var, 4 * var.double())
        (True, True)
    """
    mean, var = mean.to(dense.mean), var.to(dense.mean)
    excited = dense.variance > CONSTANT * var
    followed = excited & (pruned.variance > CONSTANT * dense.variance)
    ratio = torch.where(followed, pruned.variance / torch.where(followed, dense.variance, 1.0), 1.0)
    scale = ratio.sqrt()
    # this order leaves a channel that has not changed bit for bit as it was
    new_mean = scale * mean + (pruned.mean - scale * dense.mean)
    return new_mean, torch.where(excited, ratio * var, var + pruned.variance)
