"""Verification: a group may be pruned only if removing its channels equals masking them.

Masked means a zero on the channel wherever it is made and wherever it is read, so that neither a batch
norm's constant nor an activation's offset leaks through. Both copies are compared at the input of *every*
convolution and linear layer and at the network's output; a surgery that takes the wrong channels shows up at the
first consumer, however small its trace in the output is.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core.devices import reference_tensor
from ..core.precision import full_precision
from ..core.progress import Phase, phase
from .blame import Blame, Namer
from .classes import taken_for_fixed
from .culprits import Culprits
from .groups import ChannelGroup, PrunableGroups
from .oracle import Oracle, Outcome, Surgery
from .surgery import remove_units

__all__ = ["Passed", "masked_equals_removed", "sample_units", "verify_groups"]

TOLERANCE = 1e-3
"""Largest difference allowed at any layer input, relative to its largest value there (float32, then float64)."""

NOISE = 1e-6
"""Of the size of the rounding errors of float32, or a little larger."""


def sample_units(groups: PrunableGroups, seed: int = 0) -> dict[str, list[int]]:
    """Up to half of the units of every group, drawn at random: what the verification removes.

    Of two and more, one is the first and one the last: code that counts from the ends goes wrong where these go.

    Their number has no common divisor with that of all units, so that no part of the group (a head, a chunk) can lose
    as much as every other: what is right only then must not pass by chance. For the same reason every second group of
    one size loses fewer.
    """
    rng = np.random.default_rng(seed)
    removed, alike = {}, Counter[int]()
    for group in groups:
        half = max(1, min(group.n_units // 2, group.n_units - group.min_units))
        counts = [c for c in range(half, 0, -1) if math.gcd(c, group.n_units) == 1]
        count = counts[min(alike[group.n_units] % 2, len(counts) - 1)]
        alike[group.n_units] += 1
        drawn = rng.choice(group.n_units, count, replace=False)
        if count > 1:
            ends = [0, group.n_units - 1]
            drawn = np.concatenate([ends, drawn[~np.isin(drawn, ends)][: count - 2]])
        removed[group.name] = sorted(drawn.tolist())
    return removed


@torch.inference_mode(False)  # surgery makes parameters
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
    oracle = Oracle(groups, example_inputs, _surgery(groups), gated=gated, tolerance=tolerance, dtype=dtype)
    found = oracle.compare(removed).findings
    if not found:
        return _Verdict(None)
    return _Verdict(str(next((f for f in found if f.kind != "value"), found[0])), all(f.kind == "value" for f in found))


@dataclass
class Passed:
    """What has been found right, so that another verification of the same network need not test it again.

    Attributes:
        drawn: the units that are removed, per group.
        tests: sets of groups with these units that may be pruned together.
    """

    drawn: dict[Hashable, list[int]] = field(default_factory=dict)
    tests: set[Hashable] = field(default_factory=set)


@torch.inference_mode(False)
@full_precision()
def verify_groups(
    groups: PrunableGroups,
    example_inputs: Any,
    *,
    seed: int = 0,
    gated: PrunableGroups | None = None,
    suspects: Namer | None = None,
    passed: Passed | None = None,
) -> dict[str, str]:
    """Find the groups whose removal differs from masking.

    All groups are tested at once, in two passes. Where these differ says which groups are to blame; the rest is tested
    again, together, until it passes (see :class:`~tp_importance.graph.culprits.Culprits`). Groups that a slice at a
    computed channel would make wrong are then pruned as far as they go, and tested once more: ``x.shape[1] // 4`` may
    not move before.

    Args:
        groups: groups of the model as it is now.
        example_inputs: inputs to compare on; of a tensor two samples.
        seed: of the units that are removed.
        gated: as for :func:`masked_equals_removed`.
        suspects: names groups where the data flow does not; see :data:`~tp_importance.graph.blame.Namer`.
        passed: what earlier calls for the same network and inputs have found right; this call adds to it.

    Returns:
        reason per unsafe group; empty if all are safe.
    """
    inputs = example_inputs[:2] if isinstance(example_inputs, Tensor) else example_inputs
    with phase("verifying", unit="test", groups=len(groups)) as running:
        blame, reasons, tests = Blame(groups, suspects), dict[str, str](), 0
        passed = Passed() if passed is None else passed
        drawn = sample_units(groups, seed)
        contents = {g.name: _content(g) for g in groups}
        units = {name: passed.drawn.setdefault(content, drawn[name]) for name, content in contents.items()}
        fixed = set(taken_for_fixed(groups))
        least = {g.name: list(range(g.min_units, g.n_units)) for g in groups if g.name in fixed}
        for removed in [units, *([least] if least else [])]:
            keys = {name: (contents[name], *gone) for name, gone in removed.items()}
            examiner = _Examiner(groups, inputs, removed, gated or groups, blame, running, keys, passed.tests)
            reasons |= Culprits([name for name in removed if name not in reasons], examiner, blame).find()
            tests += examiner.tests
        running.note(tests=tests, unsafe=len(reasons))
    return reasons


class _Examiner:
    """Compares any of the groups, and does not mistake rounding for a difference.

    Places that differ in values only may be ill-conditioned. Whether they are is asked once, by a masked pass with a
    little noise. If nothing but such places is left, the comparison is repeated in float64, and so are those after it;
    where the network does not run in float64, these places count as different.
    """

    def __init__(
        self,
        groups: PrunableGroups,
        example_inputs: Any,
        units: Mapping[str, list[int]],
        gated: PrunableGroups,
        blame: Blame,
        running: Phase,
        keys: Mapping[str, Hashable],
        passed: set[Hashable],
    ) -> None:
        self.blame, self.tests = blame, 0
        self._keys, self._passed = keys, passed
        self._groups, self._inputs, self._units, self._gated = groups, example_inputs, units, gated
        self._running = running
        self._oracle = self._in(None)
        like = reference_tensor(groups.trace.model)
        self._exact = like is None or like.dtype == torch.float64
        self._rough = False  # whether it does not run in float64
        self._unsteady: set[str] | None = None

    def __call__(self, names: Sequence[str]) -> Outcome:
        key = frozenset(self._keys[name] for name in names)
        if key in self._passed:
            return Outcome([])
        outcome = self._examined(names)
        if not outcome.findings:
            self._passed.add(key)
        return outcome

    def _examined(self, names: Sequence[str]) -> Outcome:
        outcome = self._compare(self._oracle, names)
        values = [f for f in outcome.findings if f.kind == "value"]
        if not values or self._exact or outcome.reference is None:
            return outcome
        if self._unsteady is None:
            self._unsteady = self._oracle.unsteady(outcome.reference, NOISE)
        sure = [f for f in outcome.findings if f.kind != "value" or f.where not in self._unsteady]
        if sure:
            return replace(outcome, findings=sure)
        return (None if self._rough else self._again(names)) or replace(outcome, sound=frozenset())

    def _again(self, names: Sequence[str]) -> Outcome | None:
        """The same in float64, and from now on; ``None`` if the network does not run in it."""
        self._rough = True
        try:
            exact = self._in(torch.float64)
            outcome = self._compare(exact, names)
        except Exception:  # no float64 on this device, or no memory for it
            return None
        if any(f.kind in ("error", "surgery") for f in outcome.findings):
            return None
        self._oracle, self._exact, self._rough = exact, True, False
        return outcome

    def _in(self, dtype: torch.dtype | None) -> Oracle:
        return Oracle(
            self._groups,
            self._inputs,
            _surgery(self._groups),
            gated=self._gated,
            tolerance=TOLERANCE,
            dtype=dtype,
            blame=self.blame,
        )

    def _compare(self, oracle: Oracle, names: Sequence[str]) -> Outcome:
        self.tests += 1
        self._running.advance()
        return oracle.compare({n: self._units[n] for n in names}, resume=True)


def _content(group: ChannelGroup) -> Hashable:
    """What two groups have in common whose removal is the same."""
    members = [*group.dimensions, *(m for queries in group.queries for m in queries.filters)]
    norms = tuple(s.groups for s in group.statistics)
    places = ((m.dimension, m.channels.tobytes(), m.units.tobytes()) for m in members)
    return group.name, group.min_units, norms, len(group.queries), *places


def _surgery(groups: PrunableGroups) -> Surgery:
    """The surgery of copies."""

    def surgery(model: nn.Module, removed: Mapping[str, list[int]]) -> None:
        remove_units(groups, removed, model=model)

    return surgery
