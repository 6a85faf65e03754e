"""See what goes into a layer and what comes out of it, and end the pass there where nothing else is wanted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..core.forward import ForwardFn, layer_input, run_batch
from ..core.precision import at_least_float, undisturbed

__all__ = ["after_layer", "run_until_cut"]


class _Enough(BaseException):
    """Cuts a forward pass off; no ``Exception``, lest a forward function swallow it."""


def after_layer(module: nn.Module, fn: Callable[[Tensor, Tensor], None], cut: bool = False) -> Callable[[], None]:
    """Call ``fn(input, output)`` after the module ran, and end the pass there if ``cut``; returns what takes it off."""

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        x = layer_input(args, kwargs)
        with undisturbed(x.device):
            fn(at_least_float(x), at_least_float(output))
        if cut:
            raise _Enough

    return module.register_forward_hook(hook, with_kwargs=True).remove


def run_until_cut(model: nn.Module, batch: Any, forward_fn: ForwardFn | None) -> None:
    """Run the model on a batch, to the end or to the layer where a hook ends the pass."""
    try:
        run_batch(model, batch, forward_fn)
    except _Enough:
        pass
