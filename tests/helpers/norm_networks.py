"""Small networks whose norms run over channels that can go."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tp_importance import prunable_groups
from tp_importance.graph.groups import PrunableGroups

__all__ = ["NORM_NETWORKS", "norm_network"]


class RMSNorm(nn.Module):
    """As Llama writes it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


class Block(nn.Module):
    """Attention and MLP, the norm in front of them or behind the sum."""

    def __init__(self, width: int, heads: int, hidden: int, norm: type[nn.Module], before: bool) -> None:
        super().__init__()
        self.heads, self.dim, self.before = heads, width // heads, before
        self.scale: float | None = None
        self.n1, self.n2 = norm(width), norm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.f1, self.f2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def attend(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, self.dim).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.proj(mixed.transpose(1, 2).reshape(b, n, self.heads * self.dim))

    def forward(self, x: Tensor) -> Tensor:
        if self.before:
            x = x + self.attend(self.n1(x))
            return x + self.f2(F.gelu(self.f1(self.n2(x))))
        x = self.n1(x + self.attend(x))
        return self.n2(x + self.f2(F.gelu(self.f1(x))))


class Encoder(nn.Module):
    """Patches, a class token and positions, blocks, a head."""

    def __init__(self, norm: type[nn.Module] = nn.LayerNorm, before: bool = True, width: int = 12) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.cls = nn.Parameter(torch.randn(1, 1, width))
        self.pos = nn.Parameter(torch.randn(1, 5, width))
        self.blocks = nn.Sequential(*(Block(width, 3, 20, norm, before) for _ in range(2)))
        self.norm, self.head = norm(width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.pos
        return self.head(self.norm(self.blocks(x))[:, 0])


class GroupNormNet(nn.Module):
    """Residual, 4 norm groups."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.n0 = nn.Conv2d(3, 12, 3, padding=1), nn.GroupNorm(4, 12)
        self.c1, self.n1 = nn.Conv2d(12, 16, 3, padding=1), nn.GroupNorm(4, 16)
        self.c2, self.n2 = nn.Conv2d(16, 12, 3, padding=1), nn.GroupNorm(4, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.n0(self.stem(x)).relu()
        y = self.n2(self.c2(self.n1(self.c1(x)).relu()))
        return self.head((x + y).relu().mean((2, 3)))


class ResponseNormNet(nn.Module):
    """ConvNeXt V2's block: a layer norm over channels, and a response norm by means over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 10, 4, 4), nn.Conv2d(10, 10, 3, padding=1, groups=10)
        self.norm, self.f1, self.f2 = nn.LayerNorm(10), nn.Linear(10, 24), nn.Linear(24, 10)
        self.gamma, self.beta = nn.Parameter(torch.randn(24)), nn.Parameter(torch.randn(24))
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = F.gelu(self.f1(self.norm(self.depthwise(x).permute(0, 2, 3, 1))))
        response = y.norm(p=2, dim=(1, 2), keepdim=True)
        scale = response / (response.mean(-1, keepdim=True) + 1e-6)
        y = y + self.beta + self.gamma * (y * scale)
        return self.head((x + self.f2(y).permute(0, 3, 1, 2)).mean((2, 3)))


NORM_NETWORKS = {
    "prenorm": Encoder,
    "postnorm": lambda: Encoder(before=False),
    "rms": lambda: Encoder(RMSNorm),
    "torch_rms": lambda: Encoder(nn.RMSNorm),
    "groupnorm": GroupNormNet,
    "response": ResponseNormNet,
}


def norm_network(name: str, *, double: bool = False) -> tuple[nn.Module, Tensor, PrunableGroups]:
    """A network of :data:`NORM_NETWORKS` in eval mode, inputs, and its groups."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = NORM_NETWORKS[name]().eval(), torch.randn(4, 3, 8, 8)
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.normal_()
    if double:
        model, x = model.double(), x.double()
    return model, x, prunable_groups(model, x)
