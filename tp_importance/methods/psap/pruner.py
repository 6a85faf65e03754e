"""PSAP for Torch-Pruning: prune while training, then remove what is masked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ...budget import Budget, Cost
from ...core.arguments import checked_budget
from ...core.devices import to_model
from ...core.options import hand_on, split_options
from ...core.progress import shown
from ...core.stale_optimizers import replacing
from ...graph.groups import PrunableGroups
from ...graph.remap import Survivors, check_optimizer, named_tensors
from ...pruning.report import PruningReport
from ...pruning.target import PruningTarget
from .history import PSAPHistory
from .importance import PSAPImportance
from .schedule import PSAPSchedule
from .soft_masks import Ratios
from .soft_pruning import SoftPruning

__all__ = ["PSAPPruner"]


class PSAPPruner:
    r"""Self-adaptive iterative pruning with protective reconstruction (PSAP, arXiv 2303.11881).

    Works in anybody's training loop, from pretrained weights or from scratch::

        pruner = PSAPPruner(model, x, budget=Budget(macs=0.5))
        pruner.start(optimizer, total_steps=epochs * len(loader))
        for each batch: ...; loss.backward(); optimizer.step(); pruner.step()
        report = pruner.finish()

    At every prune step each coupled group loses a fraction κ·WSR of its filters, WSR being the fraction of its
    weights within a = ¼ of their root mean square, and κ the least number at which the exact cost keeps the target
    :math:`1 - final \cdot (1 - (1 - t/T)^3)`. The filters of least norm are *masked*: a gate is closed where the next
    layers read them; they stay in the forward pass up to there. During the pulse, the next optimizer steps,
    |∂L/∂gate| is watched; outliers among the masked are restored, and protected from the next prune step. After
    the last pulse they are exchanged for other filters of their group (those never restored first), so the frozen
    network keeps the budget.
    :meth:`finish` removes the masked channels physically and carries the optimizer over.

    The paper is known to us by its abstract; formulas and defaults are ours (docs/benchmarks.md).

    Args:
        model: the network. Masks live in forward hooks; weights are trained by you and changed by :meth:`finish` only.
        example_inputs: tensor, tuple or dict, batch dimension first.
        budget: what the network may cost in the end; fractions refer to ``model`` as given.
        schedule: when to prune and how long to watch.
        threshold: a of the weight sparsity ratio.
        ratios: ``"adaptive"``, or ``"uniform"`` (the same ratio everywhere; to compare with).
        protect: watch and restore; ``False`` prunes by norm alone.
        protect_steps: prune steps during which a restored filter cannot be masked; ``None``: all that follow.
        max_pruning_ratio: P_max, the largest fraction of a group that may go, or one per group name.
        **options: see :class:`~tp_importance.pruning.target.PruningTarget`.

    Raises:
        BudgetError: if the budget cannot be reached within ``max_pruning_ratio``.
        TracingError: if the network cannot be traced.
        TypeError: if ``budget`` or ``schedule`` are of another type.
        ValueError: for bad options, a latency budget, or if nothing can be pruned.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2))
        >>> x, y = torch.randn(16, 3, 8, 8), torch.arange(16) % 2
        >>> optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
        >>> pruner = PSAPPruner(net, x, budget=Budget(macs=0.5), schedule=PSAPSchedule(prune_steps=2, pulse=2))
        >>> pruner.start(optimizer, total_steps=20)
        >>> for _ in range(20):
        ...     optimizer.zero_grad()
        ...     nn.functional.cross_entropy(net(x), y).backward()
        ...     optimizer.step()
        ...     pruner.step()
        >>> pruner.finish().cost.macs <= 0.5 * pruner.dense.macs, net[0].out_channels
        (True, 4)
        >>> optimizer.state[net[0].weight]["momentum_buffer"].shape
        torch.Size([4, 3, 3, 3])
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        *,
        budget: Budget,
        schedule: PSAPSchedule = PSAPSchedule(),
        threshold: float = 0.25,
        ratios: Ratios = "adaptive",
        protect: bool = True,
        protect_steps: int | None = 1,
        max_pruning_ratio: float | Mapping[str, float] = 0.9,
        **options: Any,
    ) -> None:
        if isinstance(budget, Budget):
            budget.require_counted("PSAP's schedule")
        self.budget = checked_budget(budget)
        (for_target,) = split_options(type(self), options, PruningTarget, leave=("latency_table",))
        self.target = PruningTarget(model, example_inputs, max_pruning_ratio=max_pruning_ratio, **for_target)
        self._progress = options.get("progress")
        self.groups.require_some()
        self._soft = SoftPruning(
            self.groups,
            self.target.cost_model,
            self.target.space,
            budget.marked_limits(self.dense),
            schedule=schedule,
            threshold=threshold,
            ratios=ratios,
            protect=protect,
            protect_steps=protect_steps,
        )
        self._finished = False

    # -- the loop

    def start(self, optimizer: Optimizer | Sequence[Optimizer], total_steps: int | None = None) -> None:
        """Begin; call once, before the first forward pass of the training.

        Args:
            optimizer: the optimizer, or several. Momentum of masked filters is zeroed in it, and :meth:`finish` gives
                it the new parameters.
            total_steps: optimizer steps to come, e.g. ``epochs * len(loader)``; not needed after
                :meth:`load_state_dict`.

        Raises:
            RuntimeError: if started or finished before.
            TypeError: for something that is no optimizer.
            ValueError: for an optimizer of another model or with state that cannot be carried over, or without
                ``total_steps``.
        """
        self._require_unfinished()
        self._soft.start(optimizer, total_steps)

    def step(self) -> None:
        """Call after every ``optimizer.step()``: prunes, watches and restores when it is time; cheap otherwise.

        With gradient accumulation that is once per accumulated batch.

        Raises:
            RuntimeError: before :meth:`start`, after :meth:`finish`, or if no gradient came through the network
                during a pulse.
            StaleStatisticsError: if the model's layers were changed meanwhile.

        Warns:
            UserWarning: once, if the model is trained in eval mode, where a training diverges.
        """
        self._require_unfinished()
        with shown(self._progress):
            self._soft.step()

    def finish(self, *, average: Any = None, at_once: bool = False) -> PruningReport:
        """Remove the masked channels from the model, in place, and carry the optimizer over.

        Masked and removed network compute the same in eval mode, so there is nothing to refit. The optimizer keeps its
        groups, with their hyperparameters, and what is left of its state, so learning rate schedulers go on. May be
        called as soon as :attr:`frozen` is true; train on with a smaller network, and without :meth:`step`.

        Args:
            average: weight averages of the model to be pruned along: ``AveragedModel``, a copy of the model, a dict
                of tensors by parameter name, or a list of these.
            at_once: if the schedule is not through yet, prune the rest now, without a pulse.

        Returns:
            The :class:`~tp_importance.pruning.report.PruningReport`.

        Raises:
            RuntimeError: before :meth:`start`, before the schedule is through, or a second time.
            ValueError: if an average or the optimizer does not fit the model. The model is then as before.
        """
        self._require_unfinished()
        if not self._soft.started:
            raise RuntimeError("finish() before start(): nothing was pruned yet")
        if not self.frozen and not at_once:
            raise RuntimeError(
                f"the schedule is not through: {self.progress}. Call step() after every optimizer.step() until "
                "pruner.frozen, or finish(at_once=True) to prune the rest now"
            )
        averages = average if isinstance(average, (list, tuple)) else [] if average is None else [average]
        self._soft.require_unchanged()
        for optimizer in self._soft.optimizers:
            check_optimizer(optimizer, self.model)
        self._soft.conclude()
        removed = self._soft.removed
        before = named_tensors(self.model)
        self.target.example_inputs = to_model(self.model, self.target.example_inputs)  # it may have moved
        paused, step = self._soft.paused(), self.target.surgery()
        with shown(self._progress), paused, torch.inference_mode(False), step, replacing(self.model):
            survivors = Survivors.of(self.groups, removed)
            for each in averages:
                survivors.require_fit(each)
            plan = self.target.plan(removed, self._soft.limits)
            report = self.target.apply(plan, criterion=PSAPImportance.__name__)
            survivors.settle(before, self.model)
            step.commit()
            for optimizer in self._soft.optimizers:
                survivors.remap_optimizer(optimizer, before, self.model)
            for each in averages:
                survivors.remap_twin(each, self.model)
            self._finished = True
            paused.commit()
        return report

    # -- to look at

    @property
    def model(self) -> nn.Module:
        """The network."""
        return self.target.model

    @property
    def dense(self) -> Cost:
        """Cost of the network as given."""
        return self.target.dense

    @property
    def groups(self) -> PrunableGroups:
        """Groups of the model as it is now."""
        return self.target.groups

    @property
    def frozen(self) -> bool:
        """Whether the masks are final, so that :meth:`finish` may be called."""
        return self._soft.frozen

    @property
    def progress(self) -> str:
        """Where the schedule is, in words."""
        return self._soft.progress

    @property
    def cost(self) -> Cost:
        """Cost of the model with what is masked now removed."""
        return self._soft.cost

    @property
    def masked(self) -> dict[str, list[int]]:
        """Masked units per group."""
        return self._soft.removed

    @property
    def history(self) -> PSAPHistory:
        """What every prune step did; ``.to_frame()`` and ``.plot()``."""
        return self._soft.history

    def pruning_history(self, *, direct: bool = False) -> list[Any]:
        """Torch-Pruning's history of the surgery, as :meth:`~tp_importance.BudgetPruner.pruning_history`.

        Args:
            direct: in our own format instead.
        """
        return self.target.pruning_history(direct=direct)

    # -- state

    def state_dict(self) -> dict[str, Any]:
        """State of the soft phase: plain values and tensors, readable with ``torch.load(weights_only=True)``.

        Save it with the states of model and optimizer, between :meth:`step` and the next forward pass: a run that
        goes on from there is bit for bit the uninterrupted one.

        Raises:
            RuntimeError: after :meth:`finish`.
        """
        self._require_unfinished("save the pruned network with save_pruned()")
        return self._soft.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, before or after :meth:`start`; model and optimizer are loaded by you.

        Raises:
            RuntimeError: after :meth:`finish`.
            ValueError: if the state is of another model, budget or other options.
        """
        self._require_unfinished()
        self._soft.load_state_dict(state)

    def _require_unfinished(self, remedy: str = "build a new pruner to prune further") -> None:
        if self._finished:
            raise RuntimeError(f"finish() has removed the masked channels; {remedy}")


hand_on(PSAPPruner, PruningTarget, leave=("latency_table",))
