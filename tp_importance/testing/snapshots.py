"""What a network was, to be compared with what it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Snapshot", "same_tensors", "same_values"]


class Snapshot:
    """Everything about a model that must not change: structure, values, flags, gradients and hooks.

    Args:
        model: to be compared with itself later.
        gradients: whether parameters that have no gradient must not get one.

    >>> model = nn.Linear(2, 2)
    >>> before = Snapshot(model)
    >>> before.check()
    >>> _ = model.bias.data.add_(1)
    >>> before.check()
    Traceback (most recent call last):
    AssertionError: other values: bias
    """

    def __init__(self, model: nn.Module, *, gradients: bool = True) -> None:
        self.model, self._gradients = model, gradients
        self.values = {k: v.clone() for k, v in model.state_dict(keep_vars=False).items()}
        self.rest = self._rest()

    def _rest(self) -> dict[str, Any]:
        modules = list(self.model.modules())
        return {
            "modules": [(id(m), m.training) for m in modules],
            "attributes": [(sorted(vars(m)), m.extra_repr()) for m in modules],
            "hooks": [dict(getattr(m, key)) for m in modules for key in sorted(vars(m)) if key.endswith("_hooks")],
            "sizes": [[v for v in vars(m).values() if isinstance(v, int)] for m in modules],
            "parameters": [(id(p), p.requires_grad) for p in self.model.parameters()],
            "gradients": [p.grad is None for p in self.model.parameters() if self._gradients],
            "buffers": [id(b) for b in self.model.buffers()],
        }

    def check(self) -> None:
        """Compare with the model as it is now.

        Raises:
            AssertionError: names what has changed.
        """
        now = self.model.state_dict()
        changed = [k for k, v in self.values.items() if k in now and not torch.equal(now[k], v)]
        if changed or now.keys() != self.values.keys():
            raise AssertionError(f"other values: {', '.join(changed) or now.keys() ^ self.values.keys()}")
        for what, found in self._rest().items():
            if found != self.rest[what]:
                raise AssertionError(f"{what} have changed")


def same_tensors(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Whether two dictionaries hold the same names and, bit for bit, the same tensors."""
    return first.keys() == second.keys() and all(torch.equal(v, second[k]) for k, v in first.items())


def same_values(a: nn.Module, b: nn.Module) -> bool:
    """Whether two networks have the same parameters and buffers, bit for bit."""
    return same_tensors(a.state_dict(), b.state_dict())
