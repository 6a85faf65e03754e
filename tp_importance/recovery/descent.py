"""Steps of an optimizer that leave nothing behind but new weights, in any precision."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["Descent"]

CLIPPED = 1.0
"""Largest norm of a gradient."""
HALF = (torch.float16, torch.bfloat16)
"""Precisions in which most steps would be rounded away: weights are then kept in float32."""
SCALE = 2.0**10
"""Times which the loss is taken at first where weights are float16, so that no gradient vanishes."""


class Descent:
    """AdamW along clipped gradients.

    Half-precision parameters are rounded from float32 ones, which have the steps; with float16 the loss is scaled, and
    a step whose gradients overflow is left out and the scale halved.

    Args:
        parameters: what is trained.
        lr: learning rate of the first step.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], lr: float) -> None:
        self._parameters = list(parameters)
        self._wide = [p.detach().float() if p.dtype in HALF else p for p in parameters]
        self._scale = SCALE if any(p.dtype == torch.float16 for p in parameters) else 1.0
        self._optimizer = torch.optim.AdamW(self._wide, lr=lr)

    def step(self, loss: Tensor, lr: float) -> bool:
        """One step.

        Args:
            loss: scalar, with its graph.
            lr: learning rate.

        Returns:
            Whether loss and gradients were finite.
        """
        if not torch.isfinite(loss):
            return False
        self._clear()
        try:
            (loss * self._scale).backward()
            for wide, p in zip(self._wide, self._parameters, strict=True):
                if p.grad is not None:
                    g = p.grad.to_dense() if p.grad.is_sparse else p.grad
                    wide.grad = g.to(wide.dtype) / self._scale if self._scale > 1 else g.to(wide.dtype)
            if not torch.isfinite(nn.utils.clip_grad_norm_(self._wide, CLIPPED)):
                self._scale /= 2
                return self._scale >= 1
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._optimizer.step()
            with torch.no_grad():
                for wide, p in zip(self._wide, self._parameters, strict=True):
                    if wide is not p:
                        p.copy_(wide)
        finally:
            self._clear()
        torch.clear_autocast_cache()  # or a caller's autocast goes on with the old weights
        return True

    def _clear(self) -> None:
        for p in (*self._wide, *self._parameters):
            p.grad = None
