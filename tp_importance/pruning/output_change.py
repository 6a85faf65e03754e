"""How far the outputs of a network move when it is pruned."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.forward import run_batch, run_model
from ..core.loaders import FirstSamples
from ..core.untouched import untouched
from ..graph.trace_options import TraceOptions, output_tensors

__all__ = ["OutputChange", "Outputs"]

SAMPLES = 32
"""Of the loader; a measure, not a benchmark."""


@dataclass(frozen=True)
class OutputChange:
    r"""How far outputs moved from those of the network before the step, on a few samples.

    Attributes:
        samples: how many: the first of the loader if it is a list, else the example inputs.
        relative_error: :math:`\|\hat y - y\| / \|y\|` over all of them.
        cosine: mean over samples of that between :math:`\hat y` and :math:`y`, all outputs of a sample as one vector.
    """

    samples: int
    relative_error: float
    cosine: float

    def __str__(self) -> str:
        moved = f"outputs moved by {self.relative_error:.3f} of their norm (cosine {self.cosine:.3f})"
        return f"{moved}, on {self.samples} samples"


class Outputs:
    """Outputs of a network before it is pruned; :meth:`change` compares with those afterwards.

    Args:
        model: the network.
        example_inputs: taken where there is no list of batches, or the network does not take them as they are.
        loader: its first batches are taken if it is a list or tuple: another one would have to be read once more.
        options: how the network is called and read.
    """

    def __init__(
        self, model: nn.Module, example_inputs: Any, loader: Iterable[Any] | None, options: TraceOptions
    ) -> None:
        self._options, self._examples = options, example_inputs
        inner = loader.loader if isinstance(loader, FirstSamples) else loader
        at_hand = type(inner) in (list, tuple)
        self._batches = list(FirstSamples(inner, SAMPLES)) if at_hand and inner is not None else None
        try:
            self._before = list(self._rows(model))
        except Exception:  # a loader that nothing else would have read
            if self._batches is None:
                raise
            self._batches = None
            self._before = list(self._rows(model))

    def change(self, model: nn.Module) -> OutputChange | None:
        """How far the outputs are from those before; ``None`` if they are no numbers, or too few came back."""
        pairs = list(zip(self._before, self._rows(model), strict=False))
        if not pairs or any(a.shape != b.shape for a, b in pairs):
            return None
        # batches may be of different lengths, of text, say
        error = sum(float((b - a).square().sum()) for a, b in pairs)
        size = sum(float(a.square().sum()) for a, _ in pairs)
        cosines = torch.cat([torch.nn.functional.cosine_similarity(a, b, dim=1) for a, b in pairs])
        return OutputChange(len(cosines), (error / max(size, 1e-60)) ** 0.5, float(cosines.mean()))

    def _rows(self, model: nn.Module) -> Iterator[Tensor]:
        """All outputs of a batch, one row per sample, (n, d)."""
        run, transform = self._options.forward_fn, self._options.output_transform
        with untouched(model), torch.no_grad():
            model.eval()
            for batch in [None] if self._batches is None else self._batches:
                made = run_model(model, self._examples, run) if batch is None else run_batch(model, batch, run)
                tensors = [t for t in output_tensors(made, transform) if t.is_floating_point() and t.dim()]
                if tensors and len({len(t) for t in tensors}) == 1:
                    yield torch.cat([t.flatten(1) if t.dim() > 1 else t[:, None] for t in tensors], 1).double().cpu()
