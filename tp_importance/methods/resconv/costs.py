"""What residual convolutions cost and save: counted, and measured."""

from __future__ import annotations

import copy
import math
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from ...budget import Cost
from ...core.arguments import checked_model
from ...core.copies import copied
from ...core.processes import warn_of_processes
from ...core.progress import track
from ...graph.counting import Call, batch_size, record_calls
from ...graph.dataflow import record
from ...latency.measure import least_latency, measure_latency
from ...latency.table import LatencyTable, conditions_of, timed_layer
from .block import ResConv2d, replace_module, resconv_layers
from .conversion import fuse
from .removal import LAYERS, remove_layers

__all__ = ["LayerClock", "LayerCosts"]

ForwardFn = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True)
class LayerCosts:
    """Costs of a converted network; all exact, as layers do not change each other's.

    Attributes:
        dense: of the network before its conversion.
        fused: with all residual convolutions fused.
        savings: per cost field what the removal of each layer saves of ``fused``.
    """

    dense: Cost
    fused: Cost
    savings: dict[str, dict[str, int]]

    @classmethod
    def of(cls, model: nn.Module, example_inputs: Any, forward_fn: ForwardFn | None = None) -> LayerCosts:
        """Count, by one forward pass."""
        checked_model(model)
        samples = batch_size(example_inputs)
        recorder = record_calls(model, example_inputs, forward_fn)
        counted, params = recorder.per_sample(samples), sum(math.prod(p.shape) for p in model.parameters())
        macs = Counter[str]()
        for call in recorder.calls:
            macs[call.name] += call.macs
        before = after = params
        savings: dict[str, dict[str, int]] = {"macs": {}, "params": {}}
        for name, layer in resconv_layers(model).items():
            savings["macs"][name] = macs[f"{name}.conv"] // samples
            savings["params"][name] = layer.conv.weight.numel() + layer.conv.out_channels
            before -= layer.s.numel() + layer.a.numel()
            after += savings["params"][name] - sum(p.numel() for p in layer.parameters())
        return cls(Cost(counted, before), Cost(counted, after), savings)

    def without(self, removed: list[str]) -> Cost:
        """Cost of the fused network without some layers."""
        now = self.fused.as_dict()
        return Cost(**{f: now[f] - sum(saved[name] for name in removed) for f, saved in self.savings.items()})


class LayerClock:
    """Measured latencies of a network and of what is left of it; works on copies.

    Args:
        model: the converted network.
        example_inputs: what it is timed on.
        forward_fn: ``forward_fn(model, example_inputs)``.
        min_run_time: seconds per measurement.
    """

    def __init__(
        self, model: nn.Module, example_inputs: Any, forward_fn: ForwardFn | None, min_run_time: float
    ) -> None:
        self._model, self._inputs, self._run = model, example_inputs, forward_fn
        self._seconds = min_run_time

    @cached_property
    def dense_ms(self) -> float:
        """The network as it was before its conversion."""
        twin = copied(self._model)
        for name, layer in resconv_layers(twin).items():  # the same function does not matter here
            replace_module(twin, name, nn.Sequential(layer.conv, layer.bn))
        return self._measure(twin)

    def without_ms(self, removed: list[str]) -> float:
        """The fused network without some layers."""
        twin = copied(self._model).eval()
        if removed:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a = 0; the pruner says it when it acts
                remove_layers(twin, self._inputs, removed, forward_fn=self._run)
        return self._measure(fuse(twin) if resconv_layers(twin) else twin)

    def layers_ms(self) -> dict[str, float]:
        """Every layer by itself, fused, on an input of the size it gets."""
        flow = record(self._model, self._inputs, layers=LAYERS, forward_fn=self._run)
        table = LatencyTable(min_run_time=self._seconds / 5, measure=measure_latency)
        table.use(conditions_of(self._model, self._inputs))
        times: dict[str, float] = {}
        layers = [op for op in flow.ops if isinstance(op.module, ResConv2d)]
        for op in track(layers, "timing layers", unit="layer"):
            if isinstance(op.module, ResConv2d):
                shapes = (flow.shapes[op.inputs[0]], flow.shapes[op.outputs[0]])
                layer = timed_layer(copy.deepcopy(op.module).eval().fused(), Call(op.name, *shapes, 0))
                assert layer is not None  # it is a convolution
                times[op.name] = table.time(layer, layer.inputs, layer.outputs)
        return times

    def _measure(self, model: nn.Module) -> float:
        warn_of_processes("measured times")
        return least_latency(
            model, self._inputs, forward_fn=self._run, min_run_time=self._seconds, measure=measure_latency
        ).median_ms
