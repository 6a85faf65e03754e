"""PSAP's soft phase: when masks are chosen and corrected while a network trains, and the state of that.

Knows groups, gates and costs, but neither surgery nor hosts; see :class:`tp_importance.PSAPPruner`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ...core.eval_mode import warn_in_eval_mode
from ...core.processes import process_count
from ...core.progress import phase
from ...graph.remap import check_optimizer
from .history import PSAPHistory
from .pulse import PulsedMasks
from .schedule import PSAPSchedule

__all__ = ["SoftPruning"]

FORMAT, VERSION = "tp_importance.psap", 1


class SoftPruning(PulsedMasks):
    """Adaptive masks on a network in training; :meth:`start`, then :meth:`step` after every optimizer step.

    Args:
        *args: see :class:`~tp_importance.methods.psap.soft_masks.SoftMasks`.
        schedule: see :class:`.PSAPSchedule`.
        protect: watch the gates and restore outliers.
        **options: see :class:`~tp_importance.methods.psap.soft_masks.SoftMasks`.

    Raises:
        BudgetError: if the limits cannot be reached.
        ValueError: for bad options, or a group without filters of its own.
    """

    def __init__(
        self, *args: Any, schedule: PSAPSchedule = PSAPSchedule(), protect: bool = True, **options: Any
    ) -> None:
        if not isinstance(schedule, PSAPSchedule):
            raise TypeError(f"schedule must be a PSAPSchedule, e.g. PSAPSchedule(prune_steps=10), not {schedule!r}")
        super().__init__(*args, **options)
        self.schedule, self.protect = schedule, protect
        self._iteration, self._total = 0, 0
        self._iterations: list[int] = []
        self._pulse = 0
        self._seen_in_eval = False

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
        self.reopen()

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
            self._watch(gates, last=self._is_last)
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
            self._end_pulse(gates, last=self._is_last)
        if not self._frozen:
            self._step = len(self._iterations) - 1
            self._prune(0)

    @property
    def progress(self) -> str:
        """Where the schedule is, in words."""
        steps = len(self._iterations) or self.schedule.prune_steps
        return f"prune step {self._step} of {steps}, after {self._iteration} of {self._total} optimizer steps"

    def _prune(self, pulse: int) -> None:
        self._weights.require_unchanged()
        self._step += 1
        with phase(f"prune step {self._step} of {len(self._iterations)}") as running:
            self._started()
            self._mask(len(self._iterations), self._iteration)
            self._begin_pulse(pulse, last=self._is_last)
            masked = sum(int(mask.sum()) for mask in self.masked.values())
            running.note(after=f"{self._iteration} optimizer steps", masked=masked, cost=self.cost)

    @property
    def _is_last(self) -> bool:
        return self._step == len(self._iterations)

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


def _clone(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()
