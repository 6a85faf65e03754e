"""Labels of a whole network, found by running it once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ...core.batches import tensors_in
from .attributes import WatchedSizes, named_sizes
from .labeller import Labeller
from .ledger import Ledger

__all__ = ["labels_of"]


def labels_of(
    model: nn.Module,
    inputs: Any,
    run: Callable[[nn.Module, Any], Any],
    outputs: Callable[[Any], Sequence[Tensor]],
    *,
    axes: Mapping[int, int] | None = None,
    custom: Mapping[str, Any] | None = None,
    answers: Mapping[int, int] | None = None,
    before: Ledger | None = None,
    attention: str = "",
) -> Ledger:
    """Run a network once with labels beside all tensors.

    Args:
        model: the network, in the mode in which it is to run; its forward pass may change it, guard that outside.
        inputs: what ``run`` gives to it.
        run: ``run(model, inputs)``.
        outputs: the tensors among what it returns.
        axes: parameters of which one axis alone may lose entries, by identity.
        custom: pruning functions of the user's, by qualified name of the module: what runs inside is not looked at.
        before: what an earlier pass has found out.
        attention: of which factor of attention something may go, ``""``: of any.
        answers: what an earlier pass has found out about attention, see :func:`.attention.answers`.

    Returns:
        What was found out.
    """
    ledger, sizes = Ledger(), WatchedSizes()
    labeller = Labeller(
        model,
        ledger,
        sizes,
        tensors_in(inputs),
        dict(axes or {}),
        dict(custom or {}),
        dict(answers or {}),
        before,
        attention,
    )
    with torch.no_grad(), ExitStack() as stack:
        stack.enter_context(named_sizes(model))
        labeller.watch(stack, model)
        stack.enter_context(sizes)
        stack.enter_context(labeller)
        found = outputs(run(model, inputs))
    labeller.finish(found)
    return ledger
