"""What the catalogue says of a network, and how it is made ready."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo.scramble import scramble
from tp_importance import bake_weights, explicit_attention
from tp_importance.core.forward import ForwardFn, run_model

Inputs = Callable[[torch.Generator], Any]


@dataclass(frozen=True)
class Network:
    """One network of the catalogue.

    Attributes:
        name: in the results; names of the libraries, where it is one of theirs.
        family: part of the catalogue.
        build: makes it, with random weights; may raise ImportError where a library is missing.
        inputs: example inputs, from a generator.
        forward_fn: how it is run, if not by calling it on the inputs.
        note: what is special about it, for the reader of the table.
        quick: whether finding its groups must take no longer than ten forward passes and two seconds.
        planted: whether the test with dead channels is run on it: the parity of a channel must survive all moves.
        baked: whether computed weights are made plain parameters first.
    """

    name: str
    family: str
    build: Callable[[], nn.Module]
    inputs: Inputs
    forward_fn: ForwardFn | None = None
    note: str = ""
    quick: bool = False
    planted: bool = False
    baked: bool = False

    def ready(self, seed: int = 0) -> tuple[nn.Module, Any]:
        """The network in eval mode with nothing in it that is trivially equal and no wired heads, and its inputs."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.build().eval()
            inputs = self.inputs(torch.Generator().manual_seed(seed))
            scramble(model, lambda: self.run(model, inputs), torch.Generator().manual_seed(seed))
            if self.baked:
                bake_weights(model, inputs, forward_fn=self.forward_fn)
            explicit_attention(model, inputs, forward_fn=self.forward_fn)
        return model, inputs

    def run(self, model: nn.Module, inputs: Any) -> Any:
        return run_model(model, inputs, self.forward_fn)


def image(size: int, channels: int = 3, n: int = 1) -> Inputs:
    """``n`` random images of ``size`` × ``size``."""
    return tensor(n, channels, size, size)


def tensor(*shape: int) -> Inputs:
    """One random tensor."""

    def inputs(generator: torch.Generator) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return inputs
