"""A masked network, and pruned copies that are compared with it: one pass each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ..core.copies import copied
from ..core.devices import to_model
from ..core.forward import run_model
from ..core.untouched import untouched
from .blame import Blame, Finding
from .comparison import scrambled_copy
from .cost import CostModel
from .counting import batch_size
from .groups import PrunableGroups
from .masking import masked_units
from .pruned_pass import PrunedPass, said
from .reference import MEMORY, Reference, Removal, masked_pass, read_layers

__all__ = ["Oracle", "Outcome", "Surgery"]

Surgery = Callable[[nn.Module, Mapping[str, list[int]]], None]
"""``surgery(model, removed)`` removes units, by group, from a copy of the network."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a comparison has found.

    Attributes:
        findings: the places that differ, in order; each differs by itself.
        compared: the layers whose inputs were compared.
        sound: layers whose weights are what is to be left of them: what *they* read is not the fault.
        reference: the masked network.
    """

    findings: list[Finding]
    compared: frozenset[str] = frozenset()
    sound: frozenset[str] = frozenset()
    reference: Reference | None = field(default=None, repr=False)


class Oracle:
    """A masked network, and pruned copies that are compared with it.

    Args:
        groups: groups of the model as it is now.
        example_inputs: inputs to compare on.
        surgery: prunes a copy of the model.
        gated: groups that say where is masked; ``groups`` unless an error is planted.
        tolerance: largest difference, relative to the largest value.
        dtype: precision; ``None``: of the model, float32 if it is less.
        blame: says which groups to put back after an error.
    """

    def __init__(
        self,
        groups: PrunableGroups,
        example_inputs: Any,
        surgery: Surgery,
        *,
        gated: PrunableGroups,
        tolerance: float,
        dtype: torch.dtype | None = None,
        blame: Blame | None = None,
    ) -> None:
        self._groups, self._gated, self._surgery = groups, gated, surgery
        self._alone = {m.name for part in (groups, gated) for g in part for m in g.members if m.axis is not None}
        model = groups.trace.model
        self._original = scrambled_copy(model, dtype, shared=self._shared(model))
        self._inputs = to_model(self._original, example_inputs)  # the copies of half-precision networks are float32
        self._tolerance, self._blame = tolerance, blame or Blame(groups)
        self._layers = read_layers(groups)

    def compare(self, units: Mapping[str, list[int]], *, resume: bool = False) -> Outcome:
        """Compare the network whose ``units`` are masked with a copy that has lost them; if they agree, the cost, too.

        Args:
            units: that go, by group.
            resume: go on after operations that raise.
        """
        removal = Removal(self._groups, units)
        what = "pruning a copy"
        try:
            pruned = self._pruned(removal)
            what = "running the masked network"
            with torch.no_grad():
                reference = masked_pass(self._original, removal, self._gated, self._layers, self._run)
        except MEMORY:
            raise
        except Exception as error:
            return Outcome([Finding("", f"{what} fails: {said(error)}", "surgery")])
        with torch.no_grad():
            cut = self._pruned if resume else None
            run = PrunedPass(pruned, reference, self._run, self._blame, self._tolerance, cut=cut)
        outcome = Outcome(run.findings, frozenset(reference.inputs), frozenset(), reference)
        if run.findings:
            return replace(outcome, sound=frozenset(removal.sound(self._original, pruned)))
        problem = self._cost(
            removal, run.macs(batch_size(self._inputs), attention=self._groups.options.count_attention), pruned
        )
        return replace(outcome, findings=[Finding("", problem, "cost")]) if problem else outcome

    def unsteady(self, reference: Reference, noise: float) -> set[str]:
        """Places where a little noise moves the masked network itself by more than the tolerance.

        Args:
            reference: what was masked.
            noise: standard deviation, relative to the largest value of what each layer reads.
        """
        removal = reference.removal
        with torch.no_grad(), untouched(self._original), ExitStack() as stack:
            for groups in {id(g): g for g in (self._groups, self._gated)}.values():
                stack.enter_context(masked_units(self._original, groups, removal.units))
            nothing = removal.without(removal.units)
            run = PrunedPass(
                self._original, reference, self._run, self._blame, self._tolerance, left=nothing, noise=noise
            )
        return {finding.where for finding in run.findings}

    def _run(self, model: nn.Module) -> Any:
        """What counts as the output: what the user leaves out may change its shape."""
        options = self._groups.options
        output = run_model(model, self._inputs, options.forward_fn)
        return output if options.output_transform is None else options.output_transform(output)

    def _shared(self, model: nn.Module) -> list[nn.Parameter]:
        """Parameters whose values copies need not have for themselves: neither masks nor surgery write into them."""
        if self._groups.options.customized_pruners:  # who knows what these write into
            return []
        own = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name in self._alone}
        return [p for p in model.parameters() if id(p) not in own]

    def _pruned(self, removal: Removal) -> nn.Module:
        with torch._C.DisableTorchFunction():  # of the pass that is running
            pruned = copied(self._original, shared=self._shared(self._original))
            self._surgery(pruned, removal.units)
        return pruned

    def _cost(self, removal: Removal, macs: int, pruned: nn.Module) -> str | None:
        groups = self._groups.exclude({name: "" for name in self._groups.names if name not in removal.units})
        sizes = {g.name: g.width - len(removal.units[g.name]) * g.unit_size for g in groups}
        params = sum(p.numel() for p in pruned.parameters())
        try:
            cost = CostModel.from_groups(groups).cost(sizes)
        except ValueError as error:
            return f"the cost of the pruned copy cannot be predicted: {said(error)}"
        if (cost.macs, cost.params) == (macs, params):
            return None
        return f"the pruned copy costs {macs} MACs and {params} params, the cost model says {cost}"
