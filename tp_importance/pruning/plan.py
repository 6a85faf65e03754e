"""What a pruner would do, ready to be looked at, kept, or handed to a host that prunes by ratios."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

from torch import nn

from ..budget import Cost
from ..graph.groups import Member, PrunableGroups
from ..latency.times import LatencyTimes

__all__ = ["Plan"]


@dataclass(frozen=True)
class Plan:
    """What a pruner would do.

    Attributes:
        widths: channels to keep per group.
        cost: exact cost with these widths.
        dense: cost of the model as given at construction.
        limits: absolute limits of the budget.
        removed: units to remove per group.
        constant: units that do not vary on the data, per group that has any.
        latency_ms: latencies in milliseconds; none is known if none is limited.
        uncounted: layers whose MACs are not known and in none of the costs, with the reason.
        certificate: what the allocator proves of its widths, see
            :class:`~tp_importance.allocation.program.ProgramAllocator`.
    """

    widths: dict[str, int]
    cost: Cost
    dense: Cost
    limits: dict[str, int]
    removed: dict[str, list[int]] = field(repr=False)
    constant: dict[str, list[int]] = field(default_factory=dict, repr=False)
    certificate: dict[str, float] = field(default_factory=dict, repr=False)
    latency_ms: LatencyTimes = field(default_factory=LatencyTimes)
    uncounted: dict[str, str] = field(default_factory=dict)

    @property
    def is_noop(self) -> bool:
        """Whether nothing is removed."""
        return not any(self.removed.values())

    def pruning_ratio_dict(self, groups: PrunableGroups) -> dict[nn.Module, float]:
        """The widths as ``pruning_ratio_dict`` of Torch-Pruning, to be used with ``pruning_ratio=0``.

        Torch-Pruning keeps ``int(C · (1 − r))`` of C channels. With r = 1 − (c + ½) / C that is c, whatever the
        rounding of the floats.

        Args:
            groups: the groups the plan was made for.

        Returns:
            ``{module: ratio}`` of every producer.

        Raises:
            ValueError: if the plan is of other groups, or of these at other widths.
        """
        modules = groups.trace.model
        return {
            modules.get_submodule(m.name): 1.0 - (kept + 0.5) / m.width if kept < m.width else 0.0
            for m, kept in self._kept(groups, "producer")
        }

    def config_list(self, groups: PrunableGroups) -> list[dict[str, Any]]:
        """The widths as ``config_list`` of NNI: ``sparse_ratio`` per layer, one ``dependency_group_id`` per group.

        NNI masks ``int(C · r)`` of C filters. With r = (C − c + ½) / C that is C − c.

        Args:
            groups: the groups the plan was made for.

        Returns:
            One entry per layer that loses filters, depthwise convolutions with those they follow.

        Raises:
            ValueError: as :meth:`pruning_ratio_dict`.
        """
        first = {m.name: g.name for g in reversed(groups.groups) for m in g.members if m.role == "out"}
        entries = []
        for m, kept in [*self._kept(groups, "producer"), *self._kept(groups, "passthrough")]:
            module = dict(groups.trace.model.named_modules()).get(m.name)
            if kept == m.width or not isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
                continue
            weight = {"sparse_ratio": (m.width - kept + 0.5) / m.width, "dependency_group_id": first[m.name]}
            entries.append({"op_names": [m.name], **weight})
        return entries

    def require_made_for(self, groups: PrunableGroups) -> None:
        """Refuse groups that the plan was not made for.

        Raises:
            ValueError: names the first group that differs.
        """
        for name, left in self.widths.items():
            now = groups[name].width  # raises for an unknown one
            then = left + len(self.removed.get(name, ())) * groups[name].unit_size
            if now != then:
                raise ValueError(f"the plan was made for {then} channels of group {name}, which has {now} now")
        for name in groups.names:
            if name not in self.widths:
                raise ValueError(f"the plan is of another network: it says nothing of group {name}")

    def _kept(self, groups: PrunableGroups, kind: str) -> list[tuple[Member, int]]:
        """Members whose output channels go, and how many each keeps; one layer may be part of several groups.

        Raises:
            ValueError: if the plan is not of these groups; names the first that differs.
        """
        self.require_made_for(groups)
        kept: dict[str, int] = {}
        members: dict[str, Member] = {}
        for group in groups:
            removed = self.removed.get(group.name, [])
            for m in group.members:
                if m.role == "out" and m.kind == kind:
                    members[m.name] = m
                    kept[m.name] = kept.get(m.name, m.width) - len(m.positions(removed))
        return [(m, kept[name]) for name, m in members.items()]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """Rebuild a plan from :meth:`to_dict`.

        Raises:
            TypeError: if ``data`` is not a mapping.
            ValueError: if a field is missing, unknown or malformed; names it.
        """
        if not isinstance(data, Mapping):
            raise TypeError(f"a plan is read from a dict that to_dict() made, not from {type(data).__name__}")
        known = {f.name: f.default is MISSING and f.default_factory is MISSING for f in fields(cls)}
        missing = [name for name, required in known.items() if required and name not in data]
        unknown = [name for name in data if name not in known]
        if missing or unknown:
            raise ValueError(f"this is no plan that to_dict() made: fields missing {missing}, unknown {unknown}")
        made = {"cost": _cost, "dense": _cost, "latency_ms": LatencyTimes.from_dict}
        values: dict[str, Any] = {}
        for name, value in data.items():
            if not isinstance(value, Mapping):
                raise ValueError(f"plan field {name!r} must be a dict, not {value!r}")
            try:
                values[name] = made[name](value) if name in made else dict(value)
            except (TypeError, ValueError) as error:
                raise ValueError(f"plan field {name!r} does not hold what to_dict() writes: {error}") from error
        return cls(**values)


def _cost(data: Mapping[str, Any]) -> Cost:
    return Cost(**data)
