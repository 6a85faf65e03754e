"""Coupled groups from the labels of a network: classes of channels, put together by the layers that they touch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count, filterfalse, pairwise
from typing import Any

import numpy as np
from torch import nn

from .groups import ChannelGroup, Excluded, Member, Normalised, PrunableGroups, Queries
from .labels.ledger import Follower, Ledger
from .labels.reasons import Index, Reason
from .layer_kinds import CONV, is_depthwise
from .places import Layout, Place, counted, multiplied, normalised, queries
from .trace_options import TraceOptions
from .tracing import Trace

__all__ = ["AT_MINIMUM", "build_groups", "ignored_modules", "other_answers", "strangers", "taken_for_fixed"]


AT_MINIMUM: Reason = ("minimum", "at its smallest width")
"""Why a group that cannot become narrower is left out."""

ONE_CHANNEL: Reason = ("minimum", "one channel that the code takes apart from the others")
"""Why a part of a layer is left out that cannot become narrower."""


def build_groups(
    traced: Trace,
    ignored_layers: Sequence[nn.Module | nn.Parameter | type] | None = None,
    num_heads: Mapping[nn.Module, int] | None = None,
    options: TraceOptions = TraceOptions(),
) -> PrunableGroups:
    """Groups of a traced network, without verification; see :func:`~tp_importance.prunable_groups`."""
    ledger = traced.labels
    ignored, order = ignored_modules(traced.model, ignored_layers), traced.first_call()
    layout = Layout(traced, options)
    heads, asked, problems = _heads(traced, ledger, num_heads or {})
    classes = ledger.classes(options.choices, heads)
    reasons = ledger.reasons(classes, options.choices)
    _add(
        reasons,
        classes,
        [
            *_attended(ledger, classes, asked, options.attention),
            *problems,
            *_contradictions(ledger.following(options.choices), classes),
        ],
    )
    places = layout.places(ledger, classes)
    late = len(order)
    places.sort(key=lambda p: (order.get(p.name, late), p.name, p.role))
    for place in places:
        for c, reason in layout.reasons_of(place, ignored):
            reasons.setdefault(c, []).append(reason)
    statistics, unlike = normalised(ledger, classes)
    _add(reasons, classes, unlike)
    several = {int(c) for labels in ledger.several for c in classes[labels[labels > 0]]}
    beside = [*counted(ledger, classes, options), *statistics, *multiplied(ledger, classes)]
    beside += queries(ledger, classes, options, places)
    found = list(_groups([*places, *beside], reasons, traced.model, several))
    groups: list[ChannelGroup] = []
    excluded: list[Excluded] = []
    for group, why in _named_apart(found, order):
        if group.width == 1 and group.producers[0].width > 1:  # its labels tell nothing of where it goes
            why.insert(0, ONE_CHANNEL)
        elif not group.consumers:
            why.append(AT_MINIMUM if group.width == 1 else _unread(group))
        elif group.n_units <= group.min_units:
            why.append(AT_MINIMUM)
        if why:  # what was asked for comes last: "ignored" says that the group could be pruned otherwise
            kind, text = next((r for r in why if r[0] != "ignored"), why[0])
            excluded.append(Excluded.of(group, text, kind))
        else:
            groups.append(group)
    return PrunableGroups(groups, excluded, traced, options)


def _add(reasons: dict[int, list[Reason]], classes: Index, found: Iterable[tuple[Index, Reason]]) -> None:
    """Give reasons for labels to the classes that these are in."""
    for labels, reason in found:
        for c in np.unique(classes[labels]).tolist():
            reasons.setdefault(c, []).append(reason)


def other_answers(groups: PrunableGroups, refused: Iterable[str]) -> tuple[int, ...] | None:
    """The next answers to the open questions that some groups hang on.

    Args:
        groups: the groups, found with the answers that are in their options.
        refused: names of groups that these answers made wrong.

    Returns:
        An answer per question; ``None`` if no group hangs on a question with an answer left that lets channels go.
    """
    ledger, choices = groups.trace.labels, groups.options.choices
    if not ledger.questions:
        return None
    classes = ledger.classes(choices)
    classes_of = _classes_of(groups, classes)
    wrong = set().union(*(classes_of[name] for name in refused))
    now = [*choices, *[0] * (len(ledger.questions) - len(choices))]
    new = [
        n + 1 if n + 2 < len(question.options) and wrong & set(classes[question.labels].tolist()) else n
        for n, question in zip(now, ledger.questions, strict=True)
    ]
    return None if new == now else tuple(new)


def taken_for_fixed(groups: PrunableGroups) -> list[str]:
    """Groups that are offered because the code is believed to slice at a fixed channel in front of them.

    ``x[:, :16]`` and ``x[:, : x.shape[1] // 4]`` look alike in one pass, and in a second one if few channels are gone.
    """
    ledger, choices = groups.trace.labels, groups.options.choices
    believed = [
        question.labels
        for number, question in enumerate(ledger.questions)
        if (option := ledger.option(number, choices)) is not question.options[-1] and len(option.pinned)
    ]
    if not believed:
        return []
    classes = ledger.classes(choices)
    sliced = {int(c) for labels in believed for c in classes[labels]}
    return [name for name, own in _classes_of(groups, classes).items() if own & sliced]


def _classes_of(groups: PrunableGroups, classes: Index) -> dict[str, set[int]]:
    """The classes of labels that the channels of every group are in."""
    places = Layout(groups.trace, groups.options).places(groups.trace.labels, classes)
    at = {(p.name, p.role): p.classes for p in places}
    return {g.name: {int(c) for m in g.members for c in at[m.name, m.role][m.channels]} for g in groups}


def strangers(groups: PrunableGroups, other: Trace) -> dict[str, list[str]]:
    """What else the channels of groups touch in another trace of the same network.

    Args:
        groups: the groups.
        other: of the network in another mode.

    Returns:
        By name of the group the layers, or ``"an output"``; groups that touch nothing else are left out.
    """
    classes = other.labels.classes(groups.options.choices)
    places = Layout(other, groups.options).places(other.labels, classes)
    places.sort(key=lambda p: (p.axis is not None, p.name))
    reasons = other.labels.reasons(classes, groups.options.choices)
    outputs = {c for c, why in reasons.items() if any(kind == "output" for kind, _ in why)}
    at = {(p.name, p.role): p.classes for p in places}
    found = {}
    for group in groups:
        own = {int(c) for m in group.members if (m.name, m.role) in at for c in at[m.name, m.role][m.channels]}
        known = {(m.name, m.role) for m in group.members}
        more = [p.name for p in places if (p.name, p.role) not in known and own & set(p.classes.tolist())]
        if more:
            found[group.name] = more
        elif own & outputs:
            found[group.name] = ["an output"]
    return found


def _groups(
    places: Sequence[Place], reasons: Mapping[int, list[Reason]], model: nn.Module, several: set[int]
) -> Iterator[tuple[ChannelGroup, list[Reason]]]:
    """Classes that take as many positions of the same places, and stay or go for the same reasons, form a group."""
    per_class: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for number, place in enumerate(places):
        known = place.classes[place.classes >= 0]
        for c, n in zip(*np.unique(known, return_counts=True), strict=True):
            per_class[int(c)].append((number, int(n)))
    alike: dict[Any, list[int]] = defaultdict(list)
    for c, signature in per_class.items():
        if any(places[number].kind == "producer" for number, _ in signature):
            why = tuple(dict.fromkeys(reasons.get(c, ())))[:4]
            alike[tuple(signature), tuple(sorted({kind for kind, _ in why}))].append(c)
    modules = dict(model.named_modules())
    attending: dict[int | None, list[Place]] = defaultdict(list)
    for place in places:
        if place.query is not None:
            attending[place.query].append(place)
    last = int(max((p.classes.max(initial=0) for p in places), default=0))
    for (signature, _), mine in alike.items():
        first = next(number for number, _ in signature if places[number].kind == "producer")
        root = places[first]
        unit_of = np.full(last + 2, -1, np.int64)
        unit_of[_in_order(mine, root.classes)] = np.arange(len(mine))
        members = [_member(places[number], unit_of) for number, _ in signature]
        found = list(zip(members, (places[number] for number, _ in signature), strict=True))
        at = unit_of[root.classes]
        group = ChannelGroup(
            root.name,
            int((at >= 0).sum()),
            int((at >= 0).sum()) // len(mine),
            tuple(m for m, place in found if place.is_member),
            (root.name, "out"),
            np.flatnonzero(at >= 0),
            at[at >= 0],
            max(1 + (not several.isdisjoint(mine)), *(_fewest(modules.get(m.name)) for m in members)),
            tuple(m for m, place in found if place.attribute),
            tuple(Normalised(p.statistic.call, p.statistic.groups, m) for m, p in found if p.statistic is not None),
            tuple((p.product, m) for m, p in found if p.product is not None),
            tuple(
                Queries(_filters(attending[q], unit_of))
                for q in dict.fromkeys(p.query for _, p in found)
                if q in attending
            ),
        )
        yield group, list(dict.fromkeys(r for c in mine for r in reasons.get(c, ())))


def _in_order(mine: Sequence[int], classes: Index) -> Index:
    """The classes by their first position at the root."""
    known, first = np.unique(classes, return_index=True)
    position = dict(zip(known.tolist(), first.tolist(), strict=True))
    return np.array(sorted(mine, key=position.__getitem__), np.int64)


def _member(place: Place, unit_of: Index) -> Member:
    units = unit_of[place.classes]  # -1 reads the last entry, which is never used
    at = np.flatnonzero(units >= 0)
    return Member(place.name, place.role, place.kind, at, units[at], len(place.classes), place.axis)


def _filters(places: Sequence[Place], unit_of: Index) -> tuple[Member, ...]:
    """All filters of an attention's queries; unit -1 for those of no unit."""
    at = [np.flatnonzero(p.classes >= 0) for p in places]
    return tuple(
        Member(p.name, p.role, p.kind, here, unit_of[p.classes[here]], len(p.classes))
        for p, here in zip(places, at, strict=True)
    )


def _fewest(module: nn.Module | None) -> int:
    """With one unit left a convolution would change its kind: its groups would become channels, or be one.

    Other channels would be coupled then, and the history would not repeat on the dense network.
    """
    return 2 if isinstance(module, CONV) and module.groups > 1 and not is_depthwise(module) else 1


def _unread(group: ChannelGroup) -> Reason:
    """Why a group stays that no layer reads whose weights the criteria know."""
    others = [m.name for m in group.members if m.role == "in" or (m.axis or 0) > 0]
    only = f", only {', '.join(others)}" if others else ""
    return "unread", f"no convolution, linear or recurrent layer reads it{only}"


def _heads(
    traced: Trace, ledger: Ledger, num_heads: Mapping[nn.Module, int]
) -> tuple[list[Index], list[Index], list[tuple[Index, Reason]]]:
    """Ties of the outputs of a layer, the same dimension of every head; its labels; where that is impossible."""
    ties: list[Index] = []
    asked: list[Index] = []
    problems: list[tuple[Index, Reason]] = []
    sites = {(site.name, site.axis): site for site in ledger.sites}
    for module, heads in num_heads.items():
        name = traced.names.get(module)
        site = sites.get((f"{name}.weight", 0))
        if site is None:
            continue
        labels = np.arange(site.first, site.first + site.size)
        asked.append(labels)
        if site.size % heads:
            text = f"{name}: {site.size} channels do not divide into {heads} conv groups or heads"
            problems.append((labels, ("mixed", text)))
            continue
        blocks = labels.reshape(heads, -1)
        ties.append(np.stack([np.broadcast_to(blocks[0], blocks.shape).ravel(), blocks.ravel()]))
    return ties, asked, problems


def _attended(ledger: Ledger, classes: Index, asked: Sequence[Index], attention: str) -> Iterator[tuple[Index, Reason]]:
    """Labels that take part in attention and stay, but for those of layers whose heads the user has named.

    Of two factors one goes, and the other stays, so that a network that has a single head left has no other groups.
    """
    named = np.unique(classes[np.concatenate([np.zeros(0, np.int64), *asked])])
    for found in ledger.attended:
        by_heads, by_dims = found.varies
        if found.may_go(attention):
            continue
        how = ""
        if attention != "none":
            how = " by heads and dimensions at once" if by_heads and by_dims else ""
            how = f"{how}, and no whole heads: see attention='dims'" if not by_heads else how
            how = f"{how}, and no dimensions: see attention='heads'" if not by_dims else how
        left = found.known[~np.isin(classes[found.known], named)]
        yield left, ("mixed", f"{found.where}: its channels take part in attention{how}")


def _contradictions(followers: Sequence[Follower], classes: Index) -> list[tuple[Index, Reason]]:
    """Numbers that count several axes whose channels do not go together."""
    counted: dict[str, Index] = {}
    found: list[tuple[Index, Reason]] = []
    for f in followers:
        own = np.sort(classes[f.labels])
        known = counted.setdefault(f.name, own)
        if len(known) != len(own) or (known != own).any():
            text = f"{f.name} sets the width of channels that are not coupled"
            first = next(g.labels for g in followers if g.name == f.name)
            found.append((np.concatenate([f.labels, first]), ("pinned", text)))
    return found


def _named_apart(
    found: Sequence[tuple[ChannelGroup, list[Reason]]], order: Mapping[str, int]
) -> Iterator[tuple[ChannelGroup, list[Reason]]]:
    """The groups in execution order; those that share their first producer are numbered.

    Removing channels must not change the numbers, so that a network that is traced again has the same names. Parts of a
    layer that lie one behind the other, as a split makes them, are numbered by position: they keep their order down to
    one channel, of which labels no longer see what reads it. The first position of parts that interleave depends on
    what was removed; they are numbered by the layers that their channels reach, in execution order.
    """
    late = len(order)
    shared: dict[str, list[tuple[ChannelGroup, list[Reason]]]] = defaultdict(list)
    for entry in found:
        shared[entry[0].name].append(entry)

    def reached(group: ChannelGroup) -> Any:
        return [(order.get(m.name, late), m.name, m.role, len(m.channels) // group.n_units) for m in group.members]

    for name in sorted(shared, key=lambda n: (order.get(n, late), n)):
        parts = sorted(shared[name], key=lambda entry: _span(entry[0]))
        if len(parts) == 1:
            yield parts[0]
            continue
        spans = [_span(group) for group, _ in parts]
        if any(last >= first for (_, last), (first, _) in pairwise(spans)):
            parts.sort(key=lambda entry: reached(entry[0]))
        free = filterfalse(order.__contains__, map(f"{name}/{{}}".format, count()))
        for (group, why), own in zip(parts, free, strict=False):
            yield replace(group, name=own), why


def _span(group: ChannelGroup) -> tuple[int, int]:
    """First and last position of its channels in the layer that names it."""
    return int(group.root_channels.min()), int(group.root_channels.max())


def ignored_modules(
    model: nn.Module, ignored_layers: Sequence[nn.Module | nn.Parameter | type] | None
) -> set[nn.Module]:
    """Every module that ``ignored_layers`` names, with everything inside.

    Raises:
        TypeError: for an entry that is neither module, parameter nor type.
    """
    ignored: set[nn.Module] = set()
    for layer in ignored_layers or ():
        if isinstance(layer, nn.Module):
            ignored.update(layer.modules())
        elif isinstance(layer, type):
            for module in model.modules():
                if isinstance(module, layer):
                    ignored.update(module.modules())
        elif isinstance(layer, nn.Parameter):
            ignored.update(m for m in model.modules() if any(p is layer for p in m.parameters(recurse=False)))
        else:
            raise TypeError(f"ignored_layers takes modules, parameters or module types, not {layer!r}")
    return ignored
