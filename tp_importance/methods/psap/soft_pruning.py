"""PSAP's soft phase: masks that adapt while the network trains, and the pulse that takes some of them back.

Knows groups, gates and costs, but neither surgery nor hosts; see :class:`tp_importance.PSAPPruner`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from numbers import Integral
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from ...allocation.greedy import WidthSpace, require_reachable
from ...budget import Cost
from ...core.eval_mode import warn_in_eval_mode
from ...core.guards import Guard
from ...core.processes import process_count
from ...core.progress import phase
from ...core.types import Bools, Floats, Ints
from ...graph.cost import COST_FIELDS, CostModel
from ...graph.gates import ChannelGates
from ...graph.groups import ChannelGroup, PrunableGroups
from ...graph.remap import check_optimizer
from ...statistics.group_weights import GroupWeights, ParametersOf, own_parameters
from .history import GroupStep, PruneStep, PSAPHistory
from .schedule import PSAPSchedule
from .sparsity import adaptive_widths, cubic_target, outliers, relative_norms, select_masked, weight_sparsity

__all__ = ["Ratios", "SoftPruning"]

Ratios = Literal["adaptive", "uniform"]

FOREVER = 2**31
FORMAT, VERSION = "tp_importance.methods.psap.pruner", 1


class SoftPruning:
    """Adaptive masks on a network in training; :meth:`start`, then :meth:`step` after every optimizer step.

    Args:
        groups: groups of the model, which keeps its shapes meanwhile.
        cost: their cost model.
        space: admissible widths.
        limits: cost to end with, by field.
        schedule: see :class:`PSAPSchedule`.
        threshold: a in τ = a·RMS.
        ratios: ``"adaptive"`` by weight sparsity, or ``"uniform"`` (all sparsities taken as equal).
        protect: watch the gates and restore outliers.
        protect_steps: prune steps during which a restored unit cannot be masked; ``None``: all that follow.
        parameters_of: parameters of a module by leaf name, where they are not in the module itself.

    Raises:
        BudgetError: if the limits cannot be reached.
        ValueError: for bad options, or a group without filters of its own.
    """

    def __init__(
        self,
        groups: PrunableGroups,
        cost: CostModel,
        space: WidthSpace,
        limits: Mapping[str, int],
        *,
        schedule: PSAPSchedule = PSAPSchedule(),
        threshold: float = 0.25,
        ratios: Ratios = "adaptive",
        protect: bool = True,
        protect_steps: int | None = 1,
        parameters_of: ParametersOf = own_parameters,
    ) -> None:
        if not isinstance(schedule, PSAPSchedule):
            raise TypeError(f"schedule must be a PSAPSchedule, e.g. PSAPSchedule(prune_steps=10), not {schedule!r}")
        if ratios not in ("adaptive", "uniform"):
            raise ValueError(f"ratios={ratios!r} must be 'adaptive' or 'uniform'")
        if protect_steps is not None and (not isinstance(protect_steps, Integral) or protect_steps < 0):
            raise ValueError(f"protect_steps={protect_steps!r} must be a non-negative integer, or None for all to come")
        weight_sparsity([], threshold)  # checks it
        for group in groups:
            if not group.producers:
                raise ValueError(f"group {group.name} has no filters whose weights could be ranked; ignore its layers")
        require_reachable(cost, space, limits)
        self.groups, self.cost_model, self.space, self.limits = groups, cost, space, dict(limits)
        self.schedule, self.threshold, self.ratios = schedule, threshold, ratios
        self.protect, self.protect_steps = protect, protect_steps
        self.history = PSAPHistory()
        self.masked: dict[str, Bools] = {g.name: np.zeros(g.n_units, bool) for g in groups}
        self._weights = GroupWeights(groups, parameters_of)
        self._until = {g.name: np.zeros(g.n_units, np.int64) for g in groups}  # last prune step of the protection
        self._strength = {g.name: np.zeros(g.n_units) for g in groups}  # G with which a unit was restored
        self._iteration, self._step, self._total = 0, 0, 0
        self._pulse_left, self._pulse_count = 0, 0
        self._pulse_sum: Tensor | None = None
        self._iterations: list[int] = []
        self._pulse = 0
        self._frozen = self._seen_in_eval = False
        self._gates: ChannelGates | None = None
        self.optimizers: list[Optimizer] = []

    # -- the loop

    def start(self, optimizer: Optimizer | Sequence[Optimizer], total_steps: int | None = None) -> None:
        """Put the gates in; call once, before the first forward pass.

        Args:
            optimizer: the optimizer, or several; momentum of masked filters is zeroed in it.
            total_steps: optimizer steps to come; may be left out after :meth:`load_state_dict`.

        Raises:
            RuntimeError: if started before.
            TypeError: for something that is no optimizer.
            ValueError: for an optimizer of another model or with state that cannot be handled, or without
                ``total_steps``.
        """
        if self._gates is not None:
            raise RuntimeError("start() was called before; call step() after every optimizer.step()")
        optimizers: list[Any] = list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]
        for each in optimizers:
            check_optimizer(each, self.groups.trace.model)
        total = self._total or total_steps
        if total is None:
            raise ValueError("total_steps is missing: the number of optimizer steps to come, e.g. epochs * len(loader)")
        if total_steps not in (None, total):
            raise ValueError(f"total_steps={total_steps}, but the state that was loaded is of a run of {total} steps")
        if process_count() > 1:
            raise RuntimeError("several processes would each restore other filters: PSAP trains in one process")
        self._iterations, self._pulse = self.schedule.fit(total)
        wanted, found = self.schedule.prune_steps, len(self._iterations)
        if found < wanted and not self._iteration:
            warnings.warn(f"{total} optimizer steps have room for {found} of {wanted} prune steps", stacklevel=3)
        self._weights.require_unchanged()
        self._total, self.optimizers = total, optimizers
        self._gates = ChannelGates(self.groups)
        self._gates.set(self.masked)
        self._gates.watch(self._pulse_left > 0)

    def step(self) -> None:
        """Call after every ``optimizer.step()``: prunes, watches and restores when it is time; cheap otherwise.

        Raises:
            RuntimeError: before :meth:`start`, or if no gradient came through the network during a pulse.
            StaleStatisticsError: if the network's layers have changed.

        Warns:
            UserWarning: once, if the network is trained in eval mode, where a training diverges.
        """
        gates = self._started()
        self._iteration += 1
        if not self._seen_in_eval:
            self._seen_in_eval = warn_in_eval_mode(self.groups.trace.model, stacklevel=4)
        if self._frozen:
            return
        if self._pulse_left:
            self._watch(gates)
        if self._step < len(self._iterations) and self._iteration >= self._iterations[self._step]:
            self._prune(self._pulse if self.protect else 0)

    def conclude(self) -> None:
        """Go to the final masks at once, without another pulse, if the schedule is not through.

        A pulse that is under way is judged by what it has seen so far.
        """
        gates = self._started()
        if self._frozen:
            return
        if self._pulse_left:
            self._end_pulse(gates)
        if not self._frozen:
            self._step = len(self._iterations) - 1
            self._prune(0)

    def close(self) -> None:
        """Take the gates out; nothing is masked then."""
        if self._gates is not None:
            self._gates.remove()
        self._gates = None

    def paused(self) -> Guard:
        """A block without the gates; if it raises before its ``commit()``, they come back."""
        return _Paused(self)

    def reopen(self) -> None:
        """Put the gates back."""
        self._gates = ChannelGates(self.groups)
        self._gates.set(self.masked)
        self._gates.watch(self._pulse_left > 0)

    def require_unchanged(self) -> None:
        """Raise :class:`StaleStatisticsError` if the layers are not those the groups were built from."""
        self._weights.require_unchanged()

    @property
    def started(self) -> bool:
        """Whether the gates are in."""
        return self._gates is not None

    @property
    def frozen(self) -> bool:
        """Whether the masks are final: after the last pulse."""
        return self._frozen

    @property
    def progress(self) -> str:
        """Where the schedule is, in words."""
        steps = len(self._iterations) or self.schedule.prune_steps
        return f"prune step {self._step} of {steps}, after {self._iteration} of {self._total} optimizer steps"

    @property
    def cost(self) -> Cost:
        """Cost of the network with the present masks removed."""
        return self.cost_model.cost({g.name: self._left(g) * g.unit_size for g in self.groups})

    @property
    def removed(self) -> dict[str, list[int]]:
        """Masked units per group."""
        return {name: np.flatnonzero(mask).tolist() for name, mask in self.masked.items()}

    # -- one prune step

    def _prune(self, pulse: int) -> None:
        self._weights.require_unchanged()
        self._step += 1
        with phase(f"prune step {self._step} of {len(self._iterations)}") as running:
            self._mask(pulse)
            masked = sum(int(mask.sum()) for mask in self.masked.values())
            running.note(after=f"{self._iteration} optimizer steps", masked=masked, cost=self.cost)

    def _mask(self, pulse: int) -> None:
        gates, steps = self._started(), len(self._iterations)
        limits = self._limits_at(self._step, steps)
        sparsity = {
            g.name: weight_sparsity([f for f, _ in self._weights.filters(g, ~self.masked[g.name])], self.threshold)
            for g in self.groups
        }
        yielded = self._yield_protection(limits)
        protected = {g.name: self._protected(g.name) for g in self.groups}
        levels = self._levels(protected)
        values = list(sparsity.values()) if self.ratios == "adaptive" else [0.5] * len(self.groups)
        units, kappa = adaptive_widths(values, levels, self.cost_model.full, lambda u: self._fits(u, limits))
        for g, left in zip(self.groups, units.tolist(), strict=True):
            norms = relative_norms(self._weights.filters(g), g.n_units)
            self.masked[g.name] = select_masked(norms, self.masked[g.name], protected[g.name], g.n_units - left)
        hangs_on = -self.cost_model.marginal(units, -units)[COST_FIELDS.index("macs")]
        rows = tuple(
            GroupStep(
                group=g.name,
                sparsity=sparsity[g.name],
                ratio=float(self.masked[g.name].mean()),
                width=self._left(g) * g.unit_size,
                protected=_tuple(np.flatnonzero(protected[g.name])),
                macs=int(macs),
                yielded=yielded[g.name],
            )
            for g, macs in zip(self.groups, hangs_on, strict=True)
        )
        self.history.steps.append(
            PruneStep(self._step, self._iteration, limits, self.cost.as_dict(), float(kappa), rows)
        )
        self._pulse_left, self._pulse_count, self._pulse_sum = pulse, 0, None
        self._frozen = self._step == steps and not pulse
        self._apply(gates)

    def _limits_at(self, step: int, steps: int) -> dict[str, int]:
        share = cubic_target(1.0, step, steps)
        dense = self.cost_model.dense.as_dict()
        return {f: dense[f] - math.ceil(share * max(dense[f] - limit, 0)) for f, limit in self.limits.items()}

    def _fits(self, units: Ints, limits: Mapping[str, int]) -> bool:
        cost = self.cost_model.evaluate(units)
        return all(cost[COST_FIELDS.index(f)] <= limit for f, limit in limits.items())

    def _levels(self, protected: Mapping[str, Bools]) -> list[Ints]:
        """Admissible widths that leave room for the protected units."""
        pairs = zip(self.groups, self.space.levels, strict=True)
        return [lv[lv >= protected[g.name].sum()] for g, lv in pairs]

    def _yield_protection(self, limits: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """Give up protections, those restored for the weakest gradient first, until the limits can be kept."""
        given_up: dict[str, list[int]] = {g.name: [] for g in self.groups}
        while True:
            protected = {g.name: self._protected(g.name) for g in self.groups}
            if self._fits(np.array([lv[0] for lv in self._levels(protected)], np.int64), limits):
                return {name: tuple(units) for name, units in given_up.items()}
            name, unit = min(
                ((n, int(u)) for n, mask in protected.items() for u in np.flatnonzero(mask)),
                key=lambda at: self._strength[at[0]][at[1]],
            )
            self._until[name][unit] = 0
            given_up[name].append(unit)

    def _protected(self, name: str) -> Bools:
        return self._until[name] >= max(self._step, 1)

    def _left(self, group: ChannelGroup) -> int:
        return int((~self.masked[group.name]).sum())

    # -- the pulse

    def _watch(self, gates: ChannelGates) -> None:
        gradient = gates.take_gradient()
        if gradient is None:
            raise RuntimeError(
                "no gradient has reached the gates since the last step(): call it once after each loss.backward() and "
                "optimizer.step(), in this order"
            )
        if bool(torch.isfinite(gradient).all()):  # a gradient scaler skips such steps, too
            gradient = gradient.abs()
            self._pulse_sum = gradient if self._pulse_sum is None else self._pulse_sum.to(gradient.device) + gradient
            self._pulse_count += 1
        self._pulse_left -= 1
        if not self._pulse_left:
            self._end_pulse(gates)

    def _end_pulse(self, gates: ChannelGates) -> None:
        last = self._step == len(self._iterations)
        changes: dict[str, dict[str, tuple[int, ...]]] = {}
        if self._pulse_sum is not None:
            mean = (self._pulse_sum.double() / self._pulse_count).cpu().numpy()
            for name, strength in gates.split(mean).items():
                found = outliers(strength, self.masked[name])
                if len(found):
                    changes[name] = self._restore(self.groups[name], found, strength, last)
        self.history.steps[-1] = self.history.steps[-1].with_pulse(changes)
        self._pulse_left, self._pulse_count, self._pulse_sum = 0, 0, None
        self._frozen = last
        self._apply(gates)

    def _restore(self, group: ChannelGroup, found: Ints, strength: Floats, last: bool) -> dict[str, tuple[int, ...]]:
        """Open the gates of ``found``; after the last step close as many others of the group, for the budget's sake."""
        masked, change = self.masked[group.name], {}
        if last:
            norms = relative_norms(self._weights.filters(group), group.n_units)
            free = np.flatnonzero(~masked & ~self._protected(group.name))
            free = free[np.lexsort((norms[free], self._strength[group.name][free] > 0))]  # once restored: last
            found, kept_out = found[: len(free)], found[len(free) :]
            masked[free[: len(found)]] = True
            change = {"exchanged": _tuple(free[: len(found)]), "yielded": _tuple(kept_out)}
        masked[found] = False
        self._strength[group.name][found] = strength[found]
        self._until[group.name][found] = FOREVER if self.protect_steps is None else self._step + self.protect_steps
        return {"restored": _tuple(found), **change}

    def _apply(self, gates: ChannelGates) -> None:
        gates.set(self.masked)
        gates.watch(self._pulse_left > 0)
        self._weights.zero_momentum(self.optimizers, self.masked)

    def _started(self) -> ChannelGates:
        if self._gates is None:
            raise RuntimeError("call start(optimizer, total_steps=...) before the training loop, and step() inside it")
        return self._gates

    # -- state

    def _settings(self) -> dict[str, Any]:
        return {
            "widths": dict(self.groups.widths),
            "limits": dict(self.limits),
            "schedule": asdict(self.schedule),
            "threshold": self.threshold,
            "ratios": self.ratios,
            "protect": self.protect,
            "protect_steps": self.protect_steps,
            "floor": self.space.floor.tolist(),
        }

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on from here: plain values and tensors, for ``torch.load(weights_only=True)``.

        Save it together with the states of model and optimizer, between :meth:`step` and the next forward pass.
        """

        def tensors(values: Mapping[str, Any]) -> dict[str, Tensor]:
            return {name: torch.from_numpy(array.copy()) for name, array in values.items()}

        return {
            "format": FORMAT,
            "version": VERSION,
            "settings": self._settings(),
            "total_steps": self._total,
            "iteration": self._iteration,
            "step": self._step,
            "frozen": self._frozen,
            "masked": tensors(self.masked),
            "protected": tensors(self._until),
            "strength": tensors(self._strength),
            "pulse": {"left": self._pulse_left, "count": self._pulse_count, "sum": _clone(self._pulse_sum)},
            "history": self.history.to_list(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state_dict`; before or after :meth:`start`. Load model and optimizer as well.

        Raises:
            ValueError: if it is no such state, or was made with another model, budget or other options.
        """
        if not isinstance(state, Mapping) or state.get("format") != FORMAT:
            raise ValueError("this is no state_dict() of a PSAP pruner")
        if state.get("version") != VERSION:
            raise ValueError(f"the state has version {state.get('version')}, not {VERSION}; update tp-importance")
        missing = sorted(self.state_dict().keys() - state.keys())
        if missing:
            raise ValueError(f"the state is incomplete: {missing} are missing")
        for key, value in self._settings().items():
            if state["settings"].get(key) != value:
                raise ValueError(f"the state was made with {key}={state['settings'].get(key)!r}, here it is {value!r}")
        total = state["total_steps"] or self._total  # 0 before start()
        if self._gates is not None and self._total != total:
            raise ValueError(f"start() was called with total_steps={self._total}, the state is of {total} steps")
        self._total, self._iteration, self._step = total, state["iteration"], state["step"]
        self._iterations, self._pulse = self.schedule.fit(self._total) if self._total else ([], 0)
        self._frozen = state["frozen"]
        self.masked = {name: mask.cpu().numpy().copy() for name, mask in state["masked"].items()}
        self._until = {name: until.cpu().numpy().copy() for name, until in state["protected"].items()}
        self._strength = {name: values.cpu().numpy().copy() for name, values in state["strength"].items()}
        pulse = state["pulse"]
        self._pulse_left, self._pulse_count, self._pulse_sum = pulse["left"], pulse["count"], _clone(pulse["sum"])
        self.history = PSAPHistory.from_list(state["history"])
        if self._gates is not None:
            self._gates.set(self.masked)
            self._gates.watch(self._pulse_left > 0)


def _tuple(units: Any) -> tuple[int, ...]:
    return tuple(int(u) for u in units)


def _clone(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()


class _Paused(Guard):
    """A soft phase without its gates; see :meth:`SoftPruning.paused`."""

    def __init__(self, soft: SoftPruning) -> None:
        super().__init__()
        self._soft = soft

    def _note(self) -> None:
        self._soft._started()
        self._soft.close()

    def _restore(self, failed: bool) -> None:
        if failed and not self._committed:
            self._soft.reopen()
