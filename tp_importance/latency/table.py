"""Times of single layers on this machine at a few widths, kept in a file."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.batches import tensors_in
from ..core.devices import reference_tensor
from ..core.files import json_digest, written_at_once
from ..core.processes import warn_of_processes
from ..graph.counting import Call
from ..graph.layer_kinds import CONV, is_passthrough
from ..maths.latency import Grid, knots, stair
from .measure import Latency, device_name, least_latency, measure_latency

__all__ = ["LatencyTable", "TimedLayer", "conditions_of", "timed_layer"]

CHANNELWISE = {
    f"torch.nn.modules.{n}" for n in ("activation", "dropout", "flatten", "padding", "pooling", "upsampling")
}
"""Where modules live that work on each channel by itself; those with parameters are not timed, except batch norms."""

FORMAT, VERSION = "tp_importance.latency_table", 2
Build = Callable[[int, int], tuple[nn.Module, tuple[int, ...]]]


@dataclass(frozen=True)
class TimedLayer:
    """A layer up to its widths; what is equal here is timed once.

    Attributes:
        key: all that its time depends on but the widths.
        family: layers of one family have stairs of the same width.
        inputs: full input channels; 1 if only the outputs count (depthwise, normalisation, activation, pooling).
        outputs: full output channels.
        multiple: widths are multiples of it (convolution groups).
        build: ``build(inputs, outputs)`` gives the layer and the shape of its input.
    """

    key: str
    family: str
    inputs: int
    outputs: int
    multiple: int
    build: Build


class LatencyTable:
    """Layer times by micro-runs, shared by all networks, batches and budgets with the same conditions.

    Conditions are device, CPU threads, torch version, dtype and memory format; the file names them. The digest of what
    was measured is in the file, too: damaged times are not used.

    Args:
        path: JSON file to read, and to write what is measured to; ``None`` keeps the table in memory.
        min_run_time: seconds per measurement of a layer, which needs about thirty; networks get a hundred times that.
        remeasure: start afresh if the file was made under other conditions, rather than refuse it.
        measure: the clock, as :func:`~tp_importance.measure_latency`.

    Raises:
        ValueError: if ``path`` is no such file or damaged, or ``min_run_time`` is not positive.

    Example:
        >>> table = LatencyTable(min_run_time=0.001).use(conditions_of(nn.Linear(2, 2), torch.zeros(1, 2)))
        >>> call = Call("fc", (4, 8), (4, 2), 64)
        >>> table.time(timed_layer(nn.Linear(8, 2), call), 4, 2) > 0, len(table)
        (True, 1)
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        min_run_time: float = 0.03,
        remeasure: bool = False,
        measure: Callable[..., Latency] = measure_latency,
    ) -> None:
        if not min_run_time > 0:
            raise ValueError(f"min_run_time={min_run_time} must be positive seconds, e.g. 0.03")
        self.path = None if path is None else Path(path)
        self.min_run_time, self.measure, self._remeasure = min_run_time, measure, remeasure
        self.conditions: dict[str, Any] = {}
        self._steps: dict[str, tuple[int, int]] = {}
        self._ms: dict[str, dict[str, float]] = {}
        if self.path is not None and self.path.exists():
            self._read(self.path)

    def __len__(self) -> int:
        return sum(map(len, self._ms.values()))

    def use(self, conditions: Mapping[str, Any]) -> LatencyTable:
        """Bind the table to the conditions of a network, see :func:`conditions_of`.

        Raises:
            ValueError: if the table was measured under others, and ``remeasure`` is off.
        """
        if self.conditions and self.conditions != dict(conditions):
            other = [
                f"{k}: {self.conditions.get(k)!r}, here {v!r}"
                for k, v in conditions.items()
                if self.conditions.get(k) != v
            ]
            if not self._remeasure:
                raise ValueError(
                    f"the latency table {self.path or '(in memory)'} was measured under other conditions "
                    f"({'; '.join(other)}); give another file, or remeasure=True to replace it"
                )
            self._steps, self._ms = {}, {}
        self.conditions = dict(conditions)
        return self

    def grid(self, layer: TimedLayer) -> Grid:
        """Times of a layer at the ends of stairs near some fractions of its full widths, measured where unknown."""
        steps = self._stairs(layer)
        inputs = [1] if layer.inputs == 1 else knots(layer.inputs, steps[0], layer.multiple)
        outputs = knots(layer.outputs, steps[1], layer.multiple)
        return Grid(inputs, outputs, [[self.time(layer, i, o) for o in outputs] for i in inputs], steps)

    def time(self, layer: TimedLayer, inputs: int, outputs: int) -> float:
        """Milliseconds of a layer at given widths, measured once."""
        known = self._ms.setdefault(layer.key, {})
        key = f"{inputs}x{outputs}"
        if key not in known:
            module, shape = layer.build(inputs, outputs)
            module, x = _placed(module, shape, self.conditions)
            known[key] = self.measure(module, x, min_run_time=self.min_run_time).median_ms
        return known[key]

    def network(
        self, model: nn.Module, example_inputs: Any, forward_fn: Callable[[nn.Module, Any], Any] | None = None
    ) -> Latency:
        """Latency of a whole network by the same clock, not kept."""
        warn_of_processes("measured times")
        seconds = 100 * self.min_run_time
        return least_latency(model, example_inputs, forward_fn=forward_fn, min_run_time=seconds, measure=self.measure)

    def save(self) -> None:
        """Write the file, if there is a path; readers see the old or the new one."""
        if self.path is None:
            return
        content = {
            "format": FORMAT,
            "version": VERSION,
            "conditions": self.conditions,
            "stairs": self._steps,
            "ms": self._ms,
            "sha256": json_digest([self._steps, self._ms]),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with written_at_once(self.path) as file:
            file.write((json.dumps(content, indent=1) + "\n").encode())

    def _stairs(self, layer: TimedLayer) -> tuple[int, int]:
        if layer.family not in self._steps:
            i, o = layer.inputs, layer.outputs
            plain = layer.family == "channelwise" or layer.multiple > 1
            self._steps[layer.family] = (
                1 if plain or i == 1 else stair(lambda c: self.time(layer, c, o), i),
                1 if plain else stair(lambda c: self.time(layer, i, c), o),
            )
        return self._steps[layer.family]

    def _read(self, path: Path) -> None:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no latency table ({error}); delete it or give another path") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT or content.get("version") != VERSION:
            raise ValueError(f"{path} is no latency table of version {VERSION}; delete it or give another path")
        measured = [content.get("stairs"), content.get("ms")]
        if content.get("sha256") != json_digest(measured):
            raise ValueError(
                f"{path} is damaged, or its times were changed by hand (the digest differs); delete it to measure again"
            )
        try:
            self.conditions = dict(content["conditions"])
            self._steps = {family: (int(i), int(o)) for family, (i, o) in content["stairs"].items()}
            self._ms = {key: {w: float(ms) for w, ms in times.items()} for key, times in content["ms"].items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is malformed ({type(error).__name__}: {error}); delete it") from error


def conditions_of(model: nn.Module, example_inputs: Any) -> dict[str, Any]:
    """What layer times depend on besides the layer: device, threads, torch, dtype, memory format.

    Args:
        model: the network.
        example_inputs: as for :func:`~tp_importance.measure_latency`.
    """
    like = reference_tensor(model)
    device = torch.device("cpu") if like is None else like.device
    tensors = [*tensors_in(example_inputs), *model.parameters()]
    last = any(
        t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous() for t in tensors
    )
    return {
        "device": device_name(device),
        "place": str(device),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "dtype": str(torch.get_default_dtype() if like is None else like.dtype),
        "memory_format": "channels_last" if last else "contiguous",
    }


def timed_layer(module: nn.Module, call: Call, dim: int = 1) -> TimedLayer | None:
    """What to time for one call of a module.

    Args:
        module: a convolution or linear layer, or something that works on each channel by itself.
        call: how it was called.
        dim: where the channels of a channelwise module are.

    Returns:
        The :class:`TimedLayer`; ``None`` if its time is not a function of channels that we can measure.
    """
    if isinstance(module, CONV):
        return _conv(module, call)
    if isinstance(module, nn.Linear):
        lead = call.in_shape[:-1]
        bias = module.bias is not None

        def linear(i: int, o: int) -> tuple[nn.Module, tuple[int, ...]]:
            return nn.Linear(i, o, bias=bias), (*lead, i)

        return TimedLayer(f"Linear bias={bias} {lead}", "Linear", module.in_features, module.out_features, 1, linear)
    return _channelwise(module, call, dim)


def _conv(module: Any, call: Call) -> TimedLayer:
    kind = f"Conv{'Transpose' if module.transposed else ''}{len(module.kernel_size)}d"
    lead, space = call.in_shape[: -len(module.kernel_size) - 1], call.in_shape[-len(module.kernel_size) :]
    depthwise = is_passthrough(module)
    made = module.out_channels // module.groups if depthwise else 1  # per input, and read per output
    read = module.in_channels // module.groups if depthwise else 1
    options: dict[str, Any] = {
        "kernel_size": module.kernel_size,
        "stride": module.stride,
        "padding": module.padding,
        "dilation": module.dilation,
        "bias": module.bias is not None,
        "padding_mode": module.padding_mode,
    }
    if module.transposed:
        options["output_padding"] = module.output_padding

    def build(i: int, o: int) -> tuple[nn.Module, tuple[int, ...]]:
        i, groups = (o // made * read, o // made) if depthwise else (i, module.groups)
        return getattr(nn, kind)(i, o, groups=groups, **options), (*lead, i, *space)

    groups = f"groups={module.groups}"
    if depthwise:
        groups = "depthwise" if made == read else f"depthwise {read}:{made}"
    pointwise = all(k == 1 for k in module.kernel_size)
    return TimedLayer(
        f"{kind} {groups} {' '.join(f'{k}={v}' for k, v in options.items())} {lead} {space}",
        f"{kind} {groups} {'pointwise' if pointwise else 'spatial'}",
        1 if depthwise else module.in_channels,
        module.out_channels,
        made if depthwise else module.groups,
        build,
    )


def _channelwise(module: nn.Module, call: Call, dim: int) -> TimedLayer | None:
    shape, width = call.in_shape, call.in_shape[dim]
    norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
    plain = type(module).__module__ in CHANNELWISE and not any(True for _ in module.parameters())
    if call.out_shape[dim : dim + 1] != (width,) or not (norm or plain):
        return None
    name = f"BatchNorm{max(len(shape) - 2, 1)}d"
    what = f"{name} affine={getattr(module, 'affine', True)}" if norm else repr(module)

    def build(_: int, c: int) -> tuple[nn.Module, tuple[int, ...]]:
        layer = getattr(nn, name)(c, affine=module.affine) if norm else copy.deepcopy(module)
        return layer, (*shape[:dim], c, *shape[dim:][1:])

    rest = (*shape[:dim], "C", *shape[dim:][1:])
    return TimedLayer(f"{what} {rest}", "channelwise", 1, width, 1, build)


def _placed(module: nn.Module, shape: tuple[int, ...], conditions: Mapping[str, Any]) -> tuple[nn.Module, Tensor]:
    """Module and a random input on the device, in the dtype and in the memory format of the network."""
    dtype = getattr(torch, conditions["dtype"].removeprefix("torch."))
    x = torch.randn(shape, device="cpu").to(conditions["place"], dtype)
    module = module.to(conditions["place"], dtype)
    if conditions["memory_format"] == "channels_last":
        module = module.to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
    return module, x
