"""Consumers that lose input channels: which can be refitted, and how new weights are put into them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..graph.groups import Index, PrunableGroups
from ..graph.layer_kinds import CONV
from ..graph.layer_pruners import RECURRENT
from ..graph.patches import bn_gain, consumer_weight, feature_channels, set_consumer_weight
from ..graph.reparametrised import computed_tensors
from ..graph.surgery import checked_units
from ..graph.tracing import Trace
from ..maths.least_squares import refit
from ..maths.ridge import cross_validated
from ..statistics.consumers import MAX_FEATURES
from .report import RefitRow
from .settings import Ridge

__all__ = ["LayerRefit", "refittable", "touched", "whole"]


@dataclass(frozen=True, eq=False)
class LayerRefit:
    """One layer to be refitted: a consumer that loses features, or one whose inputs change.

    Attributes:
        name: qualified name.
        module: the layer, of the shape before surgery.
        kept: features that stay, bool, shape (G, d).
        outputs: outputs that stay, bool, shape (G, O).
        batch_norm: the batch norm that alone follows it and follows it alone, if any.
    """

    name: str
    module: nn.Module
    kept: Tensor
    outputs: Tensor
    batch_norm: nn.Module | None

    @property
    def centred(self) -> bool:
        """Whether a constant is free: there is a bias, or a batch norm's mean that takes one over."""
        return self.module.bias is not None or self.batch_norm is not None

    @property
    def weight(self) -> Tensor:
        """Weight as it is now, shape (G, O, d)."""
        return consumer_weight(self.module)

    @property
    def plain(self) -> Tensor:
        """Weight without the features that go: what surgery alone leaves."""
        return self.weight * self.kept.to(self.weight).unsqueeze(1)

    def refitted(
        self, ridge: Ridge, second: Tensor, missing: Tensor, error: Tensor, rows: float
    ) -> tuple[Tensor, float]:
        """New weight, shape (G, O, d), and the ridge it took.

        Args:
            ridge: see :class:`~tp_importance.Refit`.
            second: second moments of the inputs, shape (G, d, d).
            missing: moments of the inputs and of what :attr:`plain` lacks, shape (G, d, O).
            error: mean squares of what it lacks, shape (G, O).
            rows: rows behind the moments.
        """
        if ridge != "auto":
            return self.rounded(refit(second, self.weight, self.kept, ridge, missing=missing)), ridge
        gain = bn_gain(self.batch_norm, self.outputs.numel()).view(self.outputs.shape)
        shares = gain.square().to(error) * self.outputs.to(error)
        step, chosen = cross_validated(second, self.kept, missing, error, rows, shares, constant=self.centred)
        return self.rounded(self.plain.to(step) + step), chosen

    def adopt(
        self,
        new: Tensor,
        before: Tensor,
        after: Tensor,
        energy: Tensor,
        mean: Tensor,
        target: Tensor,
        ridge: float | None,
    ) -> RefitRow:
        """Take over a new weight, output by output where it errs less than the plain one, and report.

        Args:
            new: refitted weight as rounded by :meth:`rounded`, shape (G, O, d).
            before: squared errors of the plain weight, shape (G, O).
            after: those of the new one; only rounding to a low precision can make them larger.
            energy: mean squares of the targets, shape (G, O).
            mean: mean input, shape (G, d).
            target: mean output without bias that is wanted, shape (G, O).
            ridge: that of the new weight, for the report.
        """
        worse = after > before
        new = torch.where(worse.to(new.device).unsqueeze(2), self.plain, new)
        self._write(new, mean, target)
        return self._row(before, torch.where(worse, before, after), energy, ridge)

    def _row(self, before: Tensor, after: Tensor, energy: Tensor, ridge: float | None) -> RefitRow:
        """Report of errors per output, all of shape (G, O), over the outputs that stay."""
        stay = self.outputs.to(energy.device)
        scale = float(energy[stay].sum()) or 1.0
        error, left = (float(e[stay].sum()) / scale for e in (before, after))
        return RefitRow(self.name, int(self.kept.sum()), int((~self.kept).sum()), error, left, ridge=ridge)

    @torch.no_grad()
    def _write(self, weight: Tensor, mean: Tensor, target: Tensor) -> None:
        """Put a new weight into the layer, and the constant into its bias or the batch norm behind.

        Args:
            weight: shape (G, O, d), as rounded by :meth:`rounded`.
            mean: mean input, shape (G, d).
            target: mean output without bias that is wanted, shape (G, O).

        Raises:
            ValueError: if the weight is not finite.
        """
        if not torch.isfinite(weight).all():
            raise ValueError(
                f"layer {self.name}: the refitted weight is not finite in {weight.dtype}; use a larger ridge, or "
                "float32 weights"
            )
        shift = target - (weight.to(mean) @ mean.unsqueeze(2)).squeeze(2)
        set_consumer_weight(self.module, weight)
        torch.clear_autocast_cache()  # or a pass under autocast goes on with the old weight
        bias, norm = self.module.bias, self.batch_norm
        if isinstance(bias, Tensor):
            bias.add_(shift.flatten().to(bias))
        elif norm is not None and isinstance(norm.running_mean, Tensor):
            norm.running_mean.sub_(shift.flatten().to(norm.running_mean))

    def rounded(self, weight: Tensor) -> Tensor:
        """A weight in the precision of the layer."""
        return weight.to(self.weight)

    def tensors(self) -> list[Tensor | None]:
        """Everything that :meth:`adopt` writes into."""
        norm = self.batch_norm
        return [self.module.weight, self.module.bias, None if norm is None else norm.running_mean]  # type: ignore[list-item]


def touched(groups: PrunableGroups, removed: Mapping[str, Sequence[int]]) -> PrunableGroups:
    """Only the groups that lose units.

    Raises:
        ValueError: for an unknown group or unit, or if too few units would be left.
    """
    names = {group.name for group, _ in checked_units(groups, removed)}
    return PrunableGroups([g for g in groups if g.name in names], [], groups.trace, groups.options)


def refittable(
    groups: PrunableGroups,
    removed: Mapping[str, Sequence[int]],
    leave: Mapping[str, str] | None = None,
    *,
    downstream: bool = False,
) -> tuple[list[LayerRefit], list[RefitRow]]:
    """Consumers that lose features and can be refitted, in execution order, and those that cannot, with the reason.

    Depthwise convolutions are no consumers: what they pass on is made up for by the next dense consumer.

    Args:
        groups: the groups of the network.
        removed: units to be removed, per group name.
        leave: consumers that are not to be refitted, and why.
        downstream: add all layers that run after the first of these consumers: their inputs change.

    Raises:
        ValueError: for an unknown group or unit, or if too few units would be left.
    """
    model, gone, lost = groups.trace.model, defaultdict[str, list[Index]](list), defaultdict[str, list[Index]](list)
    for group, units in checked_units(groups, removed):
        for m in group.members:
            if m.kind == "consumer":
                gone[m.name].append(m.positions(units))
            elif m.role == "out":
                lost[m.name].append(m.positions(units))
    owners = _owners(model)
    order, calls = groups.trace.first_call(), Counter(call.name for call in groups.trace.calls)
    names = set(gone)
    if downstream and gone:
        first = min(order.get(name, len(order)) for name in gone)
        layers = {n for n, m in model.named_modules() if isinstance(m, (*CONV, nn.Linear))}
        names |= {n for n in layers if order.get(n, -1) > first}
    refits, skipped = [], []
    for name in sorted(names, key=lambda n: order.get(n, len(order))):
        module = model.get_submodule(name)
        obstacle = _obstacle(module, owners)
        if name not in gone and not obstacle and calls[name] > 1:
            obstacle = "it loses nothing, and runs several times: a refit would take passes of its own"
        reason = (leave or {}).get(name) or obstacle
        if name not in gone and reason:
            continue  # its inputs change a little, that is all
        channels, loss = feature_channels(module), gone[name] if name in gone else []
        kept = ~torch.isin(channels, torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *loss])))
        outputs = torch.ones(_shape(module)[:2], dtype=torch.bool, device="cpu")
        if name in lost:
            outputs.view(-1)[torch.from_numpy(np.concatenate(lost[name]))] = False
        if reason:
            skipped.append(RefitRow(name, int(kept.sum()), int((~kept).sum()), skipped=reason))
        elif downstream or not bool(kept.all()):
            refits.append(LayerRefit(name, module, kept, outputs, groups.trace.batch_norm_behind(name, alone=True)))
    return refits, skipped


def whole(trace: Trace, names: Sequence[str]) -> tuple[list[LayerRefit], list[RefitRow]]:
    """Layers that keep all their features, to be refitted to other inputs, and rows that say why others cannot be.

    Args:
        trace: of the network.
        names: of convolutions and linear layers.
    """
    owners, calls = _owners(trace.model), Counter(call.name for call in trace.calls)
    refits, skipped = [], []
    for name in names:
        module = trace.model.get_submodule(name)
        reason = _obstacle(module, owners)
        if not reason and calls[name] > 1:
            reason = "it runs several times: a refit would take passes of its own"
        if reason:
            skipped.append(RefitRow(name, 0, 0, skipped=reason))
            continue
        groups, outputs, features = _shape(module)
        kept, stay = (torch.ones(groups, n, dtype=torch.bool, device="cpu") for n in (features, outputs))
        refits.append(LayerRefit(name, module, kept, stay, trace.batch_norm_behind(name, alone=True)))
    return refits, skipped


def _owners(model: nn.Module) -> Counter[int]:
    """How many modules hold each parameter."""
    return Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)


def _obstacle(module: nn.Module, owners: Counter[int]) -> str:
    if isinstance(module, RECURRENT):
        return "it is a recurrent layer, whose outputs are not linear in its inputs"
    if "weight" not in module._parameters:
        by = next(c.by for c in computed_tensors(module) if c.leaf == "weight")
        return f"its weight is no plain parameter but computed ({by})"
    if computed_tensors(module):
        return f"its {computed_tensors(module)[0].leaf} is no plain parameter but computed"
    if any(owners[id(p)] > 1 for p in module._parameters.values() if p is not None):
        return "it shares its parameters with another layer"
    features = _shape(module)[2]
    if features > MAX_FEATURES:
        return f"{features} features are too many for a moment matrix (at most {MAX_FEATURES})"
    return ""


def _shape(module: nn.Module) -> tuple[int, int, int]:
    """G, O and d."""
    groups, outputs, features = consumer_weight(module).shape
    return groups, outputs, features
