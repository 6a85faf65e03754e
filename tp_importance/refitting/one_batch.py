"""All samples of a loader as one batch, where the activations of a sequential refit fit into memory then."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from operator import length_hint
from typing import Any

from ..core.batches import FlatBatch, joined
from ..core.loaders import iterate
from ..core.progress import LOGGER, track
from ..graph.tracing import Trace
from .layers import LayerRefit

__all__ = ["bytes_per_sample", "one_batch"]

FLOAT = 4
"""Bytes of a number."""


def bytes_per_sample(
    trace: Trace, refits: Sequence[LayerRefit], sampled: int | None, with_sums: Collection[int]
) -> int:
    """Estimate: all targets, and at the worst layer its rows and twice what goes in and out.

    Args:
        trace: of the network.
        refits: consumers to be refitted.
        sampled: output positions per sample, ``None`` for all.
        with_sums: numbers of the consumers whose target is a sum, which both networks have to give.
    """
    index, targets, worst = {r.name: i for i, r in enumerate(refits)}, 0, 0.0
    for call in trace.calls:
        here = 2 * (math.prod(call.in_shape) + math.prod(call.out_shape)) / trace.batch_size
        if call.name in index:
            i = index[call.name]
            groups, outputs, d = refits[i].weight.shape
            total = math.prod(call.out_shape) // (trace.batch_size * groups * outputs)
            q = total if sampled is None else min(sampled, total)
            targets += q * groups * outputs * (3 if i in with_sums else 1)
            here += 3 * q * groups * (d + outputs)
        worst = max(worst, here)
    return int(FLOAT * (worst + targets))


def one_batch(loader: Iterable[Any], bytes_per_sample: int, limit: int) -> Any | None:
    """All batches of a loader as one, or ``None`` if that takes too much memory or they do not fit together.

    Args:
        loader: iterable of batches; read no further than to the batch that decides.
        bytes_per_sample: memory that a sample takes.
        limit: bytes that there are.

    Raises:
        ValueError: if there is no batch.
    """
    batches, samples = list[FlatBatch](), 0
    for batch in track(iterate(loader), "reading", length_hint(loader), unit="batch"):
        flat = FlatBatch.of(batch)
        if flat is None or (batches and flat.form != batches[0].form):
            return None
        samples += flat.samples
        if samples * bytes_per_sample > limit:
            LOGGER.info(
                "%d samples would take %.1f GiB at once, memory_limit is %.1f: every layer takes passes of its own; "
                "fewer samples or Refit(memory_limit=...) take two in all",
                samples,
                samples * bytes_per_sample / 2**30,
                limit / 2**30,
            )
            return None
        batches.append(flat)
    if not batches:
        raise ValueError("the loader gave no batch; a re-iterable of batches is needed (a generator runs only once)")
    return joined(batches)
