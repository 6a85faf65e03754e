"""New weights of one consumer, by least squares."""

from __future__ import annotations

import torch

from ..maths.least_squares import Shortfall, output_energy, residual_energy
from ..maths.moments import Moments
from .layers import LayerRefit
from .report import RefitRow
from .settings import Ridge

__all__ = ["refitted_by_moments", "refitted_by_shortfall"]


def refitted_by_moments(consumer: LayerRefit, moments: Moments, ridge: Ridge) -> RefitRow:
    """Give a consumer the weights that lose least of its output, from the moments of its dense input.

    Args:
        consumer: gets them.
        moments: of its input, shape (G, d, d).
        ridge: of the least squares.
    """
    old, mean, second = consumer.weight, moments.mean(), moments.total()
    if not consumer.centred:
        second += mean.unsqueeze(2) * mean.unsqueeze(1)
    gone = (old - consumer.plain).to(second)
    before = output_energy(second, gone)
    new, chosen = consumer.refitted(ridge, second, second @ gone.mT, before, moments.rows)
    after = output_energy(second, new.to(second) - old.to(second))
    target = (old.to(mean) @ mean.unsqueeze(2)).squeeze(2)
    return consumer.adopt(new, before, after, output_energy(second, old), mean, target, chosen)


def refitted_by_shortfall(consumer: LayerRefit, sums: Shortfall, ridge: Ridge) -> RefitRow:
    """Give a consumer the weights that come closest to its target, from its inputs in the pruned network.

    Args:
        consumer: gets them.
        sums: of its inputs and of what its output lacks.
        ridge: of the least squares.

    Raises:
        ValueError: if its input is not finite.
    """
    second, mean, cross, error, energy, lacking = sums.moments(consumer.centred)
    if not torch.isfinite(energy.sum()):
        raise ValueError(f"the input of layer {consumer.name} is not finite; check the data and the model")
    target = (consumer.plain.to(mean) @ mean.unsqueeze(2)).squeeze(2) + lacking
    new, after, chosen = consumer.plain, error, None
    if bool((error > 0).any()):  # else bit for bit what it was
        new, chosen = consumer.refitted(ridge, second, cross, error, sums.inputs.rows)
        step = new.to(second) - consumer.plain.to(second)
        after = residual_energy(second, step, cross, error)
    return consumer.adopt(new, error, after, energy, mean, target, chosen)
