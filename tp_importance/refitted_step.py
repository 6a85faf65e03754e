"""Refit for Torch-Pruning's own pruners: whatever they remove, the consumers are refitted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .core.arguments import checked_model
from .core.batches import tensors_in
from .core.copies import copied
from .core.forward import ForwardFn, run_model
from .core.guards import preserved, transaction
from .core.processes import warned_once
from .core.progress import phase, shown
from .core.stale_optimizers import replacing
from .core.untouched import untouched
from .graph.discovery import prunable_groups
from .graph.groups import ChannelGroup, PrunableGroups
from .graph.label_graph import LabelGraph
from .graph.layer_kinds import CONV, is_passthrough
from .graph.layer_pruners import channel_pruners
from .graph.modes import training_pass
from .graph.patches import consumer_weight, feature_channels
from .graph.remap import Survivors, named_tensors
from .graph.reparametrised import computed_tensors, follows, weight_source
from .graph.surgery import settled
from .graph.trace_options import TraceOptions
from .pruning.pruner import BudgetPruner
from .refitting.refit import refit_consumers
from .refitting.report import RefitReport, RefitRow
from .refitting.settings import Refit
from .statistics.batchnorm import recalibrate_batchnorm
from .statistics.dense_reference import DenseReference
from .statistics.labels import LabelFn
from .statistics.running_statistics import has_batch_norm, is_calibrated

__all__ = ["Removal", "refitted_step", "removal"]


@dataclass
class Removal:
    """What a host removes, in terms of our groups.

    Attributes:
        units: units that go, per group name.
        leave: consumers that lose anything else, and why they cannot be refitted.
        rows: the same consumers as rows of a report.
    """

    units: dict[str, list[int]] = field(default_factory=dict)
    leave: dict[str, str] = field(default_factory=dict)
    rows: list[RefitRow] = field(default_factory=list)

    def cannot_refit(self, refused: str, module: nn.Module, name: str, alive: Tensor) -> None:
        """Note a consumer of which the input channels ``alive``, bool, shape (C,), stay."""
        kept = alive[feature_channels(module)]
        self.leave[name] = refused
        self.rows.append(RefitRow(name, int(kept.sum()), int((~kept).sum()), skipped=refused))

    def added_to(self, report: RefitReport) -> RefitReport:
        """The report with the consumers that it does not know of."""
        listed = {row.name for row in report.rows}
        return replace(report, rows=[*report.rows, *(row for row in self.rows if row.name not in listed)])


@warned_once()
def refitted_step(
    pruner: Any,
    example_inputs: Any,
    loader: Iterable[Any],
    refit: Refit | str = "sequential",
    *,
    forward_fn: ForwardFn | None = None,
    output_transform: Callable[[Any], Any] | None = None,
    label_fn: LabelFn | None = None,
    allow_stale: bool = False,
    progress: bool | None = None,
) -> RefitReport:
    """``pruner.step()``, and the layers that read removed channels are refitted to those that stay.

    What the pruner removed is found by repeating its history on a copy whose entries are their own positions; the
    refit is done on a copy of the network before the step and what survives of it is put into the pruned one. Channels
    of groups for which removal is not masking, and parts of units, are reported and not made up for.

    Torch-Pruning prunes the network's outputs, too, classes say, unless the layers that make them are among the
    pruner's ``ignored_layers``. Nothing could make up for that, so a step that changes the shape of the output is
    refused. So is one that takes channels which a layer reads in training mode only (an auxiliary head): the host does
    not follow it, and the network would fail there. Parameters that are cut are new objects without a gradient; all
    others keep theirs.

    Args:
        pruner: a pruner of Torch-Pruning with any importance (``BasePruner``, ``MetaPruner``, ``BNScalePruner``, ...),
            the layers that make the network's outputs among its ``ignored_layers``.
        example_inputs: those the pruner was built with.
        loader: re-iterable of batches.
        refit: settings, or ``"sequential"`` or ``"parallel"``, see :class:`~tp_importance.Refit`; batch norms follow
            the change unless they say otherwise.
        forward_fn: ``forward_fn(model, batch)``; as given to the pruner.
        output_transform: as given to the pruner.
        label_fn: ``label_fn(batch)``.
        allow_stale: accept that layers which run in training mode only keep their old width.
        progress: show a progress bar; by default in a terminal.

    Returns:
        The :class:`~tp_importance.refitting.report.RefitReport`.

    Raises:
        TypeError: for a pruner of this package, which refits by ``step(refit=...)``, or something else.
        RuntimeError: if the pruner's history does not explain what it removed.
        ValueError: for bad data, or if outputs of the network, or what training mode alone reads, were cut off. After
            any exception the model is as before the step; build the pruner anew.

    Example:
        >>> import torch_pruning as tp
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
        >>> x = torch.randn(16, 3, 12, 12)
        >>> pruner = tp.pruner.BasePruner(net, x[:2], tp.importance.MagnitudeImportance(), pruning_ratio=0.5,
        ...                               ignored_layers=[net[4]])
        >>> report = refitted_step(pruner, x[:2], [x])
        >>> net[2].in_channels, [(r.name, r.after < r.before) for r in report.rows]
        (4, [('2', True), ('4', True)])
    """
    settings = Refit.of_weights(refit)
    _require_host(pruner)
    model, graph = checked_model(pruner.model, "pruner.model"), pruner.DG
    options = TraceOptions(
        forward_fn,
        output_transform,
        list(graph.unwrapped_parameters) or None,
        dict(graph.CUSTOMIZED_PRUNERS) or None,
        list(pruner.ignored_params),
    )
    dense = copied(model)
    names = {m: name for name, m in model.named_modules()}
    heads = {dense.get_submodule(names[m]): n for m, n in pruner.num_heads.items() if m in names}
    options = options.on_copy(model, dense)
    known = len(_history(graph))
    step = transaction(model, (*model.parameters(), *model.buffers()))
    with shown(progress), torch.inference_mode(False), step, replacing(model):
        outputs = _output_shapes(dense, example_inputs, forward_fn)
        try:
            with settled(model), preserved(model), phase("removing channels"):
                pruner.step()
            cut = _output_shapes(model, example_inputs, forward_fn)
        except Exception as error:
            if not (found := _beyond_the_host(dense, options)):
                raise
            raise RuntimeError(
                f"Torch-Pruning cannot prune {type(model).__name__} ({type(error).__name__}: {error}); the model is as "
                f"before. {found}"
            ) from error
        if cut != outputs:
            left_out = _groups(dense, example_inputs, options, heads, False).excluded
            made = [e.name for e in left_out if e.kind == "output"]
            raise ValueError(
                f"the step cut off outputs of the network (shapes {outputs} became {cut}); the model is as before. "
                f"Build the pruner with the layers that make them in ignored_layers: {made}"
            )
        survivors = Survivors.replay(dense, example_inputs, _history(graph)[known:], options)
        survivors.settle(named_tensors(dense), model)
        groups = _groups(dense, example_inputs, options, heads)
        what = removal(groups, lambda name: survivors.alive(f"{name}.{weight_source(dense.get_submodule(name))}"))
        # in sequential mode batch norms follow as it refits, against the dense network at hand
        reference = (
            DenseReference(copied(dense), _left(dense, survivors))
            if settings.follows and has_batch_norm(dense)
            else None
        )
        if not allow_stale:
            _require_no_stale(groups, example_inputs, what)
        report = refit_consumers(
            dense,
            example_inputs,
            loader,
            what.units,
            settings,
            groups=groups,
            leave=what.leave,
            forward_fn=forward_fn,
            label_fn=label_fn,
            progress=progress,
        )
        with torch.no_grad():
            for name, tensor in named_tensors(dense).items():
                named_tensors(model)[name].copy_(survivors.take(name, tensor))
        if reference is not None:
            recalibrate_batchnorm(model, loader, reference=reference, forward_fn=forward_fn)
        step.commit()
    return what.added_to(report)


def _history(graph: Any) -> list[Any]:
    """All that was removed so far; of :func:`~tp_importance.label_groups` in the format that needs no host's graph."""
    return graph.direct_history if isinstance(graph, LabelGraph) else graph.pruning_history()


def _left(dense: nn.Module, survivors: Survivors) -> dict[str, Tensor]:
    """Channels of every batch norm that are left."""
    return {n: survivors.index[f"{n}.running_mean"] for n, m in dense.named_modules() if is_calibrated(m)}


def _require_host(pruner: Any) -> None:
    if isinstance(pruner, BudgetPruner):
        raise TypeError(f"{type(pruner).__name__} refits by itself: call pruner.step(refit='sequential')")
    if not all(hasattr(pruner, name) for name in ("model", "DG", "step", "num_heads", "ignored_params")):
        given = f"the class {pruner.__name__}" if isinstance(pruner, type) else f"of type {type(pruner).__name__}"
        raise TypeError(f"pruner is {given}; give a pruner of Torch-Pruning, e.g. tp.pruner.BasePruner(model, ...)")


def _groups(
    model: nn.Module, x: Any, options: TraceOptions, heads: Mapping[nn.Module, int], verify: bool = True
) -> PrunableGroups:
    return prunable_groups(
        model,
        x,
        num_heads=heads,
        unwrapped_parameters=options.unwrapped_parameters,
        customized_pruners=options.customized_pruners,
        forward_fn=options.forward_fn,
        output_transform=options.output_transform,
        allow_stale=True,  # the host has removed them already
        verify=verify,
    )


def _require_no_stale(groups: PrunableGroups, x: Any, what: Removal) -> None:
    """Refuse a step that took channels which a layer reads in training mode only: the host does not follow it."""
    reasons = training_pass(groups.trace.model, x, groups.options).reasons(groups)
    lost = {group: reasons[group] for group in what.units if group in reasons}
    if lost:
        layers = sorted({m.name for group in lost for m in groups[group].producers})
        raise ValueError(
            f"the step removed channels that are read in training mode only ({lost}); the model is as before. Build "
            f"the pruner with the layers that make them in ignored_layers: {layers}"
        )


def _beyond_the_host(model: nn.Module, options: TraceOptions) -> str:
    """What Torch-Pruning by itself cannot cut in a network, and the remedy; empty if there is nothing."""
    found = []
    ours = {kind.__name__ for kind in channel_pruners(model) if kind not in (options.customized_pruners or {})}
    if ours:
        found.append(
            f"It cannot cut {', '.join(sorted(ours))} by itself: build the pruner with "
            "customized_pruners=tp_importance.channel_pruners(model)"
        )
    stuck = [(n, c[0]) for n, m in model.named_modules() if (c := computed_tensors(m)) and not follows(m, "in")]
    return "; ".join([*found, *(what.reason(name) for name, what in stuck)])


def _output_shapes(model: nn.Module, x: Any, forward_fn: ForwardFn | None) -> list[tuple[int, ...]]:
    with untouched(model), torch.no_grad():
        return [tuple(t.shape) for t in tensors_in(run_model(model.eval(), x, forward_fn))]


def removal(groups: PrunableGroups, alive: Callable[[str], Tensor]) -> Removal:
    """Whole units of verified groups that go, and the consumers that lose anything else.

    Args:
        groups: groups of the network before surgery.
        alive: which entries of the weight of a layer are left, bool, in the shape of the weight.

    Returns:
        The :class:`Removal`.
    """
    result, model = Removal(), groups.trace.model
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (*CONV, nn.Linear)) and not is_passthrough(m)}
    left = {n: consumer_weight(m, alive(n)) for n, m in layers.items() if weight_source(m)}
    inputs = {n: _channels(layers[n], table) for n, table in left.items()}
    outputs = {n: table.any(2).flatten() for n, table in left.items()}
    explained: dict[str, Tensor] = {n: torch.zeros_like(a) for n, a in inputs.items()}
    broken: dict[str, str] = {}
    for group in groups:
        units, problem = _whole_units(group, inputs, outputs)
        if problem:
            broken[group.name] = problem
        elif units:
            result.units[group.name] = units
            for m in group.consumers:
                explained[m.name][torch.from_numpy(m.positions(units))] = True
    refused = [f"{e.name}: {e.reason}" for e in groups.excluded if any(_loses(outputs.get(n)) for n in e.layers)]
    for name, gone in explained.items():
        if not bool((~inputs[name] & ~gone).any()):
            continue
        mine = [broken[g.name] for g in groups if g.name in broken and any(m.name == name for m in g.consumers)]
        reason = "it loses channels that cannot be accounted for (" + "; ".join(mine or refused) + ")"
        result.cannot_refit(reason, layers[name], name, inputs[name])
    return result


def _channels(module: nn.Module, left: Tensor) -> Tensor:
    """Input channels of which a weight is left, bool, shape (C,); ``left`` as :func:`consumer_weight` lays it out."""
    channels = feature_channels(module)
    alive = torch.zeros(int(channels.max()) + 1, dtype=torch.bool, device="cpu")
    alive[channels[left.any(1)]] = True
    return alive


def _loses(alive: Tensor | None) -> bool:
    return alive is not None and not bool(alive.all())


def _whole_units(
    group: ChannelGroup, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
) -> tuple[list[int], str]:
    """Units of which nothing is left in any producer or consumer; a reason if a unit is left in part."""
    lost: set[int] | None = None
    for m in (*group.producers, *group.consumers):
        alive = (outputs if m.kind == "producer" else inputs).get(m.name)
        if alive is None:
            return [], f"the weight of {m.name} is no plain parameter"
        here = alive[torch.from_numpy(m.channels)].numpy()
        some = set(np.unique(m.units[here]).tolist())
        gone = set(np.unique(m.units[~here]).tolist())
        if some & gone or (lost is not None and gone != lost):
            return [], f"only parts of units of {group.name} go, seen at {m.name}"
        lost = gone
    units = sorted(lost or ())
    if group.n_units - len(units) < group.min_units:
        return [], f"group {group.name} loses all of its channels"
    return units, ""
