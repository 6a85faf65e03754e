"""One call: prune a network to a budget and restore it by least squares, without training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from .allocation.registry import Allocator
from .budget import Budget
from .core.arguments import checked_budget
from .core.copies import copied
from .core.guards import transaction
from .core.loaders import FirstSamples, check_loader, require_reiterable
from .core.options import hand_on, parameters_of, split_options
from .core.processes import warned_once
from .pruning.pruner import BudgetPruner
from .pruning.registry import find_criterion, find_importance
from .pruning.report import PruningReport
from .recovery.recover import recover as recover_network
from .recovery.report import RecoveryReport
from .recovery.settings import Recovery
from .refitting.settings import Refit
from .statistics.gradients import LossFn, checked_loss_fn

__all__ = ["OneShot", "prune"]


@dataclass(frozen=True)
class OneShot:
    """What :func:`prune` returns.

    Attributes:
        model: the network that was given, pruned in place.
        report: widths, costs, what was left alone, and how well the refit restored every layer.
        pruner: the pruner, for its ``pruning_history()`` and further steps; it holds a copy of the dense network.
        recovery: what the recovery did, if there was one.
    """

    model: nn.Module
    report: PruningReport
    pruner: BudgetPruner
    recovery: RecoveryReport | None = None

    def __str__(self) -> str:
        return "\n".join(str(part) for part in (self.report, self.recovery) if part is not None)


@warned_once()
def prune(
    model: nn.Module,
    example_inputs: Any,
    loader: Iterable[Any] | None = None,
    *,
    budget: Budget,
    method: str | Any = "obs",
    allocator: str | Allocator | None = None,
    refit: Refit | str | bool | None = "sequential",
    recover: Recovery | bool | float | None = None,
    samples: int | None = 512,
    loss_fn: LossFn | None = None,
    **options: Any,
) -> OneShot:
    r"""Prune ``model`` in place to a budget that is met exactly, and make up for it by least squares; no training.

    Channels are ordered by the loss that is left after the consumers are refitted (:class:`.OBSImportance`), widths
    follow from the losses and the exact cost, Torch-Pruning removes the channels, and every layer behind them is
    refitted so that the network gives what it gave before on the samples. The recommended way to prune without
    training, and to start a fine-tuning (with :class:`~tp_importance.Distiller`): build the optimizer afterwards, for
    parameters that are cut are new objects without a gradient. All others keep theirs, and memory formats stay.

    Args:
        model: the network.
        example_inputs: tensor, tuple or dict, batch dimension first.
        loader: re-iterable of batches like those the network will see; labels are needed only by methods that use them.
            Without one a method must look at weights only (``"l1"``, ``"l2"``, ``"fpgm"``, ``"random"``), and
            ``refit=None``.
        budget: what the network may cost. Fractions refer to ``model`` as given to this call: pruned twice to 0.5, a
            quarter is left. Further steps of the pruner that is returned refer to the network before the first.
        method: any importance of this package or of Torch-Pruning, or a registered name
            (:func:`~tp_importance.register_method`): ``"obs"``, ``"catro"``, ``"itpruner"``, ``"psap"`` (in one shot),
            ``"l1"``, ``"l2"`` (also ``"magnitude"``), ``"fpgm"``, ``"taylor"`` (gradients of the cross entropy over the
            samples), ``"random"`` (seed 0; others: :class:`~tp_importance.automl.RandomImportance`).
        allocator: ``"greedy"``, ``"lagrange"``, ``"program"``, ``"uniform"`` or a function, see
            :mod:`tp_importance.allocation.registry`; default (also ``"default"``): what suits the importance, see
            :func:`~tp_importance.allocation.registry.default_allocator`.
        refit: how the network is repaired, see :class:`~tp_importance.Refit`; ``"parallel"`` is faster and less
            accurate, ``"batchnorm"`` only moves batch norm statistics, ``None`` does nothing.
        recover: train the pruned network afterwards to give what the dense one gives on the samples, without labels:
            ``True``, a number of minutes or a :class:`~tp_importance.Recovery`; see :func:`~tp_importance.recover`.
        samples: stop after the batch with which there are that many samples, ``None`` for all. Fewer than a few
            hundred cost accuracy (docs/benchmarks.md).
        loss_fn: ``loss_fn(output, labels)`` for the methods that look at gradients of a loss, ``"taylor"`` and
            ``"psap"``; default: cross entropy. All others refuse one. A network that returns more than its logits needs
            it: ``loss_fn=lambda output, labels: F.cross_entropy(output[0], labels)``.
        **options: see :class:`~tp_importance.BudgetPruner`.

    Returns:
        :class:`OneShot`.

    Raises:
        BudgetError: if the budget cannot be reached.
        TracingError: if the network cannot be traced.
        TypeError: for a model, method, budget, allocator, loader or loss that is none, before anything runs; for a
            network whose output the loss does not take.
        ValueError: for bad data or options, and for a ``loss_fn`` that the method has no use for. After any exception
            the model is as before.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 2))
        >>> loader = [(torch.randn(16, 3, 8, 8), torch.arange(16) % 2) for _ in range(4)]
        >>> result = prune(net, torch.randn(1, 3, 8, 8), loader, budget=Budget(macs=0.5))
        >>> net[0].out_channels, result.report.cost.macs <= 0.5 * result.report.dense.macs
        (4, True)
        >>> all(row.after <= row.before for row in result.report.refit.rows)
        True
    """
    if samples is not None and (isinstance(samples, bool) or not isinstance(samples, int) or samples < 1):
        raise ValueError(f"samples={samples!r} must be a positive integer, e.g. 512, or None for all of the loader")
    settings, recovery = Refit.of(refit), Recovery.of(recover)
    _refuse_options_of_the_method(method, options)
    (chosen,) = split_options(prune, options, BudgetPruner, leave=("importance",))
    data = loader
    if loader is not None:
        require_reiterable(loader)
        check_loader(loader)
        data = loader if samples is None else FirstSamples(loader, samples)
    elif settings is not None:
        raise ValueError(
            f"refit={settings.mode!r} needs images: pass a loader, prune(model, x, loader, ...), or refit=None"
        )
    if recovery is not None:
        recovery.require_data(data)
    importance = find_importance(method, "method")
    if loss_fn is not None:
        _take_loss(loss_fn, importance, method)
    pruner = BudgetPruner(
        model, example_inputs, data, importance=importance, budget=checked_budget(budget), allocator=allocator, **chosen
    )
    if recovery is None or data is None:
        return OneShot(model, pruner.step(refit=settings), pruner)
    dense = copied(model)
    with transaction(model, (*model.parameters(), *model.buffers())):
        report = pruner.step(refit=settings)
        recovered = recover_network(model, dense, data, recovery, forward_fn=pruner.groups.options.forward_fn)
    return OneShot(model, report, pruner, recovered)


hand_on(prune, BudgetPruner, leave=("importance",))


def _refuse_options_of_the_method(method: Any, options: Mapping[str, Any]) -> None:
    """A method by name has its defaults; whoever wants others gives an object."""
    if not isinstance(method, str):
        return
    make = find_criterion(method).make
    assert make is not None
    theirs = [name for name in options if name in parameters_of(make) and name not in parameters_of(BudgetPruner)]
    if theirs:
        name = getattr(make, "__name__", "Importance")
        raise TypeError(f"{theirs[0]!r} is an option of {name}: give the object, method={name}({theirs[0]}=...)")


def _take_loss(loss_fn: LossFn, importance: Any, method: Any) -> None:
    """Give the loss to an importance that takes gradients by itself, and refuse one that nobody would use."""
    checked_loss_fn(loss_fn)
    if not isinstance(method, str):
        name = type(importance).__name__
        raise ValueError(
            f"loss_fn is for methods given by name; {name} comes as an object: "
            + (
                f"give it the loss, method={name}(loss_fn=...)"
                if hasattr(importance, "loss_fn")
                else f"if it looks at gradients, method=GradientImportance({name}(), loss_fn=...)"
            )
        )
    if not hasattr(importance, "loss_fn"):
        raise ValueError(f"method={method!r} looks at no loss, so loss_fn would do nothing: leave it out")
    importance.loss_fn = loss_fn
