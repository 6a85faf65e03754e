"""Building a drawn network: the tensors there are so far, and steps that add to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from benchmarks.zoo.drawn import functions as f

Numbers = tuple[int, int, int, int]
Step = tuple[str, Numbers]
CHANNELS, ENTRIES = 48, 1536
"""No tensor becomes wider than this, or holds more entries per sample."""
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BATCH_NORM = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE_NORM = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
SIDE = {1: 8, 2: 6, 3: 4}


@dataclass(frozen=True)
class Node:
    """One line of the network: a layer by its name or a function, and what it reads.

    Attributes:
        what: layer or function.
        reads: tensors by number, parameters by name.
        makes: numbers of the tensors that it makes.
    """

    what: str | Callable[..., Any]
    reads: tuple[int | str, ...]
    makes: tuple[int, ...]


class Drawn(nn.Module):
    """The network of a program."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self.scales = nn.ParameterDict()
        self.nodes: list[Node] = []
        self.results: list[int] = []

    def forward(self, x: Tensor) -> Any:
        values = {0: x}
        for node in self.nodes:
            made = self.apply_node(node, [values[r] for r in node.reads if isinstance(r, int)])
            values.update(zip(node.makes, made, strict=True))
        found = [values[r] for r in self.results]
        return found[0] if len(found) == 1 else tuple(found)

    def apply_node(self, node: Node, values: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What a node makes."""
        given = iter(values)
        reads = [self.scales[r] if isinstance(r, str) else next(given) for r in node.reads]
        work = self.layers[int(node.what)] if isinstance(node.what, str) else node.what
        made = work(*reads)
        return tuple(made) if isinstance(made, (tuple, list)) else (made,)

    @property
    def fixes_sizes(self) -> bool:
        """Whether the code names numbers of channels, which one pass does not show; verification refuses them then."""
        fixed = (f.to_fixed_map, f.split_at)
        return any(isinstance(node.what, partial) and node.what.func in fixed for node in self.nodes)

    def __str__(self) -> str:
        lines = []
        for node in self.nodes:
            what = node.what
            if isinstance(what, str):
                text = f"layers.{what}: {self.layers[int(what)]}".replace("\n", "")
            elif isinstance(what, partial):
                text = ", ".join([what.func.__name__, *(f"{k}={v}" for k, v in what.keywords.items())])
            else:
                text = what.__name__
            reads = ", ".join(r if isinstance(r, str) else f"v{r}" for r in node.reads)
            lines.append(f"{', '.join(f'v{i}' for i in node.makes)} = [{text}]({reads})")
        return "\n".join([*lines, f"return {', '.join(f'v{i}' for i in self.results)}"])


class Split(nn.Module):
    """A split whose sizes the module keeps."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self.sizes = sizes

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.split(self.sizes, 1)


class Attention(nn.Module):
    """Every pixel looks at all others.

    Args:
        width: channels.
        heads: of the attention.
        dim: of a head.
        packed: one projection for queries, keys and values.
        fused: by torch's function, which scales by the dimensions that are there.
    """

    def __init__(self, width: int, heads: int, dim: int, *, packed: bool, fused: bool) -> None:
        super().__init__()
        self.heads, self.dim, self.scale, self.packed, self.fused = heads, dim, dim**-0.5, packed, fused
        sizes = [3 * heads * dim] if packed else [heads * dim] * 3
        self.inner = nn.ModuleList(nn.Linear(width, size) for size in sizes)
        self.out = nn.Linear(heads * dim, width)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        n, length, _ = tokens.shape
        if self.packed:
            q, k, v = self.inner[0](tokens).view(n, length, 3, self.heads, self.dim).permute(2, 0, 3, 1, 4)
        else:
            q, k, v = (layer(tokens).view(n, length, self.heads, self.dim).transpose(1, 2) for layer in self.inner)
        if self.fused:
            y = nn.functional.scaled_dot_product_attention(q, k, v)
        else:
            y = (q @ k.mT * self.scale).softmax(-1) @ v
        return self.out(y.transpose(1, 2).flatten(2)).transpose(1, 2).unflatten(2, x.shape[2:])


class Builder:
    """Runs steps on a tensor, and writes down what they do."""

    def __init__(self, x: Tensor) -> None:
        self.net, self.values = Drawn(), [x]
        self.read: set[int] = set()

    def take(self, number: int, fits: Callable[[Tensor], bool] = lambda _: True) -> int | None:
        """A tensor that fits: mostly the latest, with higher numbers an earlier one."""
        found = [i for i in reversed(range(len(self.values))) if fits(self.values[i])]
        return found[max(0, number - 4) % len(found)] if found else None

    def emit(self, what: str | nn.Module | Callable[..., Any], *reads: int | str) -> int:
        """Add a node; returns the number of its last tensor, or of its first input if what it makes is too large."""
        if isinstance(what, nn.Module):
            what = self.layer(what)
        numbers = [r for r in reads if isinstance(r, int)]
        made = self.net.apply_node(Node(what, reads, ()), [self.values[i] for i in numbers])
        first = len(self.values)
        self.net.nodes.append(Node(what, reads, tuple(range(first, first + len(made)))))
        self.values += made
        self.read.update(numbers)
        return len(self.values) - 1

    def layer(self, module: nn.Module) -> str:
        self.net.layers.append(module.eval())
        return str(len(self.net.layers) - 1)

    def parameter(self, value: Tensor) -> str:
        name = f"p{len(self.net.scales)}"
        self.net.scales[name] = nn.Parameter(value)
        return name


def dims(x: Tensor) -> int:
    """Axes of pixels."""
    return x.dim() - 2


def is_map(x: Tensor) -> bool:
    return x.dim() > 2


def pixels(x: Tensor) -> int:
    return x.shape[2:].numel()


def fits(channels: int, n: int) -> bool:
    """Whether a tensor with so many channels and pixels is small enough."""
    return 0 < channels <= CHANNELS and channels * n <= ENTRIES


def divisors(n: int) -> list[int]:
    """All but one, ascending."""
    return [d for d in range(2, n + 1) if n % d == 0]
