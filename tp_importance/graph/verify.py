"""The oracle: a group may be pruned only if removing its channels equals masking them.

Masked means a zero gate on the channel wherever it is made and wherever it is read, so that neither a batch
norm's constant nor an activation's offset leaks through. Both copies are compared at the input of *every*
convolution and linear layer and at the network's output; a surgery that takes the wrong channels shows up at the
first consumer, however small its trace in the output is.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..core.batches import tensors_in
from ..core.copies import copied
from ..core.devices import reference_tensor, to_model
from ..core.forward import call_model, fresh_inputs, layer_input
from ..core.precision import full_precision
from ..core.progress import phase
from ..core.untouched import untouched
from .cost import CostModel
from .gates import channel_dim, with_input
from .groups import Index, PrunableGroups
from .surgery import remove_units
from .tracing import COUNTED, TraceOptions, count_ops, is_batch_norm, is_depthwise, trace

__all__ = ["difference", "gates", "masked_equals_removed", "same_groups", "sample_units", "verify_groups"]

TOLERANCE = 1e-3
"""Largest difference allowed at any layer input, relative to its largest value there (float32, then float64)."""


def sample_units(groups: PrunableGroups, seed: int = 0) -> dict[str, list[int]]:
    """Up to half of the units of every group, drawn at random: what the oracle removes.

    Their number has no common divisor with that of all units, so that no part of the group (a head, a chunk) can lose
    as much as every other: what is right only then must not pass by chance.
    """
    rng = np.random.default_rng(seed)
    removed = {}
    for group in groups:
        half = max(1, min(group.n_units // 2, group.n_units - group.min_units))
        count = max(c for c in range(1, half + 1) if math.gcd(c, group.n_units) == 1)
        removed[group.name] = sorted(rng.choice(group.n_units, count, replace=False).tolist())
    return removed


@contextmanager
def gates(model: nn.Module, groups: PrunableGroups, removed: Mapping[str, list[int]]) -> Iterator[None]:
    """Zero the channels of ``removed`` units where they are produced and where they are read, inside the context."""
    inputs: dict[str, list[Index]] = defaultdict(list)
    outputs: dict[str, list[Index]] = defaultdict(list)
    for name, units in removed.items():
        for member in groups[name].members:
            if member.kind != "passthrough":
                (inputs if member.role == "in" else outputs)[member.name].append(member.positions(units))
    with ExitStack() as stack:
        for name, positions in inputs.items():
            module = model.get_submodule(name)
            pre = _zero_input(channel_dim(module), torch.as_tensor(np.concatenate(positions)))
            stack.callback(module.register_forward_pre_hook(pre, prepend=True, with_kwargs=True).remove)
        for name, positions in outputs.items():
            module = model.get_submodule(name)
            post = _zero_output(channel_dim(module), torch.as_tensor(np.concatenate(positions)))
            stack.callback(module.register_forward_hook(post, prepend=True).remove)
        yield


@torch.inference_mode(False)  # the copies are traced
@full_precision()  # rounding must not look like a difference
def masked_equals_removed(
    groups: PrunableGroups,
    example_inputs: Any,
    removed: Mapping[str, list[int]],
    *,
    gated: PrunableGroups | None = None,
    tolerance: float = TOLERANCE,
) -> str | None:
    """Compare the masked model with a physically pruned copy.

    If values differ, and nothing else, both are compared once more in float64: sums over fewer channels are rounded
    otherwise, and some networks magnify that. Where the network does not run in float64, the first verdict stands.

    Args:
        groups: groups of the model as it is now.
        example_inputs: inputs to compare on.
        removed: units to remove, per group name.
        gated: groups that place the gates; differs from ``groups`` only in tests that plant an error.
        tolerance: see :data:`TOLERANCE`.

    Returns:
        ``None`` if both agree and the pruned copy costs what the cost model says, else where and how they differ.
    """
    found = _compare(groups, example_inputs, removed, gated or groups, tolerance, None)
    like = reference_tensor(groups.trace.model)
    if not found.may_be_rounding or like is None or like.dtype == torch.float64:
        return found.problem
    try:
        again = _compare(groups, example_inputs, removed, gated or groups, tolerance, torch.float64)
    except Exception:  # no float64 on this device, or no memory for it
        return found.problem
    return again.problem if again.problem is None or again.may_be_rounding else found.problem


@dataclass(frozen=True)
class _Verdict:
    """How two copies differ, if they do, and whether only in values."""

    problem: str | None
    may_be_rounding: bool = False


def _compare(
    groups: PrunableGroups,
    example_inputs: Any,
    removed: Mapping[str, list[int]],
    gated: PrunableGroups,
    tolerance: float,
    dtype: torch.dtype | None,
) -> _Verdict:
    """One comparison, see :func:`masked_equals_removed`, in the precision of the model (float32 if it is less)."""
    model, options = groups.trace.model, groups.options
    original = _scrambled_copy(model, dtype)
    example_inputs = to_model(original, example_inputs)  # the copies of half-precision networks are float32
    pruned = copied(original)
    run = options.forward_fn or call_model
    keep = _kept_positions(groups, removed)
    try:
        predicted = CostModel.from_groups(groups)
        with torch.no_grad(), gates(original, gated, removed):
            masked, masked_out = _layer_inputs(original, example_inputs, run)
        rebuilt = same_groups(pruned, example_inputs, groups)
        remove_units(rebuilt, removed)
        with torch.no_grad():
            left, left_out = _layer_inputs(pruned, example_inputs, run)
        counted = count_ops(pruned, example_inputs, forward_fn=run)
    except torch.OutOfMemoryError:  # says nothing about the groups
        raise
    except Exception as error:
        said = str(error).splitlines()[0][:160] if str(error) else ""
        return _Verdict(f"pruning a copy fails: {type(error).__name__}: {said}")
    if [name for name, _ in masked] != [name for name, _ in left]:
        return _Verdict("the pruned copy calls its layers in another order")
    pairs = [
        (f"input of {name}", _select(original.get_submodule(name), a, keep.get(name)), b)
        for (name, a), (_, b) in zip(masked, left, strict=True)
    ]
    outputs = zip(tensors_in(masked_out), tensors_in(left_out), strict=True)
    values = None
    for where, a, b in [*pairs, *(("output of the network", a, b) for a, b in outputs)]:
        if a.shape != b.shape:
            return _Verdict(f"{where}: {difference(a, b, tolerance)}")
        problem = difference(a, b, tolerance) if values is None else None
        values = f"{where}: {problem}" if problem else values
    sizes = {g.name: g.width - len(removed.get(g.name, ())) * g.unit_size for g in groups}
    cost = predicted.cost(sizes)
    if (cost.macs, cost.params) != counted:
        return _Verdict(f"the pruned copy costs {counted[0]} MACs and {counted[1]} params, the cost model says {cost}")
    return _Verdict(values, values is not None)


def verify_groups(groups: PrunableGroups, example_inputs: Any, *, seed: int = 0) -> dict[str, str]:
    """Find the groups whose removal differs from masking.

    All groups are tested at once, two passes in all; only if that fails are the culprits found by bisection.

    Returns:
        reason per unsafe group; empty if all are safe.
    """
    removed = sample_units(groups, seed)
    inputs = example_inputs[:2] if isinstance(example_inputs, Tensor) else example_inputs
    reasons: dict[str, str] = {}

    def test(names: list[str]) -> str | None:
        subset = groups.exclude({n: "" for n in groups.names if n not in names})
        problem = masked_equals_removed(subset, inputs, {n: removed[n] for n in names})
        running.advance()
        return problem

    def safe(names: list[str]) -> list[str]:
        problem = test(names) if names else None
        if problem is None:
            return names
        if len(names) == 1:
            reasons[names[0]] = f"removal is not masking: {problem}"
            return []
        half = len(names) // 2
        first, second = safe(names[:half]), safe(names[half:])
        if not first or not second or test(first + second) is None:
            return first + second
        for name in second:  # safe apart, not together: keep as many as go with the first half
            problem = test([*first, name])
            if problem is None:
                first.append(name)
            else:
                reasons[name] = f"removal together with other groups is not masking: {problem}"
        return first

    with phase("verifying", unit="test", groups=len(groups)) as running:
        safe(groups.names)
        running.note(unsafe=len(reasons))
    return reasons


def same_groups(model: nn.Module, example_inputs: Any, groups: PrunableGroups) -> PrunableGroups:
    """The groups of ``groups`` on a copy of their model."""
    source = groups.trace.model
    options: TraceOptions = groups.options.on_copy(source, model)
    traced = trace(model, example_inputs, options)
    return PrunableGroups(groups.groups, [], traced, options)


def _scrambled_copy(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy whose batch norms do something: at their initial values a wrong surgery can look right.

    In ``dtype``, or where that is ``None`` in float32 for what is of half precision.
    """
    halves = (torch.float16, torch.bfloat16)
    twin = copied(model).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.is_floating_point() and (dtype is not None or parameter.dtype in halves):
                parameter.data = parameter.data.to(dtype or torch.float32)
        for buffer_owner in twin.modules():
            for key, buffer in buffer_owner.named_buffers(recurse=False):
                if buffer.is_floating_point() and (dtype is not None or buffer.dtype in halves):
                    setattr(buffer_owner, key, buffer.to(dtype or torch.float32))
            norm = is_batch_norm(buffer_owner) or isinstance(buffer_owner, nn.modules.instancenorm._InstanceNorm)
            for key, low, high in (("weight", 0.5, 1.5), ("bias", -0.5, 0.5)) if norm else ():
                value = getattr(buffer_owner, key)
                if isinstance(value, Tensor):
                    shape = value.shape
                    value.copy_(torch.rand(shape, generator=generator) * (high - low) + low)
    return twin


def _layer_inputs(model: nn.Module, example_inputs: Any, run: Any) -> tuple[list[tuple[str, Tensor]], Any]:
    """Inputs of every counted layer in call order, and the network's output."""
    seen: list[tuple[str, Tensor]] = []
    with untouched(model), ExitStack() as stack:
        model.eval()
        stack.enter_context(_StrongNeighbours())
        for name, module in model.named_modules():
            if isinstance(module, COUNTED) and not isinstance(module, nn.MultiheadAttention):
                # after the gates, which are prepended
                hook = module.register_forward_pre_hook(
                    lambda _m, args, kwargs, n=name: seen.append((n, layer_input(args, kwargs).detach())),
                    with_kwargs=True,
                )
                stack.callback(hook.remove)
        output = run(model, fresh_inputs(example_inputs))
    return seen, output


class _StrongNeighbours(TorchFunctionMode):
    """Lets local response norms be felt: as usually set, neighbours move a channel by less than the tolerance."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is nn.functional.local_response_norm:
            args, kwargs = args[:2], {**kwargs, "alpha": 1.0, "beta": 0.75, "k": 1.0}
        return func(*args, **kwargs)


def _kept_positions(groups: PrunableGroups, removed: Mapping[str, list[int]]) -> dict[str, Tensor]:
    gone: dict[str, list[Index]] = defaultdict(list)
    widths: dict[str, int] = {}
    depthwise = {name for name, module in groups.trace.model.named_modules() if is_depthwise(module)}
    for name, units in removed.items():
        for m in groups[name].members:
            if m.role == "in" or m.name in depthwise:
                gone[m.name].append(m.positions(units))
                widths[m.name] = m.width
    return {n: torch.as_tensor(np.setdiff1d(np.arange(widths[n]), np.concatenate(p))) for n, p in gone.items()}


def _select(module: nn.Module, x: Tensor, keep: Tensor | None) -> Tensor:
    return x if keep is None else x.index_select(x.dim() + channel_dim(module), keep.to(x.device))


def difference(a: Tensor, b: Tensor, tolerance: float) -> str | None:
    """How ``b`` differs from ``a`` by more than ``tolerance`` times the largest value of ``a``, or ``None``."""
    if a.shape != b.shape:
        return f"shape {tuple(b.shape)} after removal, {tuple(a.shape)} masked"
    if not a.is_floating_point() and not a.is_complex():  # masks, argmax
        return None if torch.equal(a, b) else f"{a.dtype} values differ"
    scale = float(a.abs().max()) if a.numel() else 0.0
    error = float((a - b).abs().max()) if a.numel() else 0.0
    if not error <= tolerance * max(scale, 1e-30):  # NaN counts as a difference
        return f"differs by {error:.2g} on a scale of {scale:.2g}"
    return None


def _zero_input(dim: int, positions: Tensor) -> Any:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        x = layer_input(args, kwargs)
        return with_input(args, kwargs, x.index_fill(x.dim() + dim, positions.to(x.device), 0.0))

    return hook


def _zero_output(dim: int, positions: Tensor) -> Any:
    def hook(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return output.index_fill(output.dim() + dim, positions.to(output.device), 0.0)

    return hook
