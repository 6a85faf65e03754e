"""Verification: a group may be pruned only if removing its channels equals masking them.

Masked means a zero on the channel wherever it is made and wherever it is read, so that neither a batch
norm's constant nor an activation's offset leaks through. Both copies are compared at the input of *every*
convolution and linear layer and at the network's output; a surgery that takes the wrong channels shows up at the
first consumer, however small its trace in the output is.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core.batches import tensors_in
from ..core.copies import copied
from ..core.devices import reference_tensor, to_model
from ..core.forward import call_model
from ..core.precision import full_precision
from ..core.progress import phase
from .channel_axes import channel_dim
from .comparison import difference, layer_inputs, scrambled_copy
from .cost import CostModel
from .counting import count_ops
from .groups import Index, PrunableGroups
from .layer_kinds import is_depthwise
from .masking import masked_units
from .surgery import remove_units
from .trace_options import TraceOptions
from .tracing import trace

__all__ = ["masked_equals_removed", "same_groups", "sample_units", "verify_groups"]

TOLERANCE = 1e-3
"""Largest difference allowed at any layer input, relative to its largest value there (float32, then float64)."""


def sample_units(groups: PrunableGroups, seed: int = 0) -> dict[str, list[int]]:
    """Up to half of the units of every group, drawn at random: what the verification removes.

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
        gated: groups that say where is masked; differs from ``groups`` only in tests that plant an error.
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
    original = scrambled_copy(model, dtype)
    example_inputs = to_model(original, example_inputs)  # the copies of half-precision networks are float32
    pruned = copied(original)
    run = options.forward_fn or call_model
    keep = _kept_positions(groups, removed)
    try:
        predicted = CostModel.from_groups(groups)
        with torch.no_grad(), masked_units(original, gated, removed):
            masked, masked_out = layer_inputs(original, example_inputs, run)
        rebuilt = same_groups(pruned, example_inputs, groups)
        remove_units(rebuilt, removed)
        with torch.no_grad():
            left, left_out = layer_inputs(pruned, example_inputs, run)
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
