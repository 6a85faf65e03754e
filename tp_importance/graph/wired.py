"""Modules of libraries whose code computes the sizes of attention heads from a width: no head of theirs can go."""

from __future__ import annotations

from dataclasses import replace

from .groups import Excluded, PrunableGroups

__all__ = ["REMEDY", "WIRED", "with_remedies"]

WIRED: set[str] = set()
"""Names of their classes; :mod:`tp_importance.attention` writes down those that it knows how to rewrite."""

REMEDY = "explicit_attention(model, example_inputs) makes heads and sizes plain"


def with_remedies(groups: PrunableGroups) -> PrunableGroups:
    """The same groups; where one of these modules is the reason that others are left out, what can be done is said.

    Args:
        groups: groups of a network.
    """
    model = groups.trace.model
    named = [(name, f"{type(m).__module__}.{type(m).__qualname__}") for name, m in model.named_modules()]
    wired = [name for name, kind in named if kind in WIRED]

    def said(left_out: Excluded) -> Excluded:
        inside = any(layer == name or layer.startswith(f"{name}.") for name in wired for layer in left_out.layers)
        named = any(name and name in left_out.reason for name in wired)
        if left_out.kind not in ("mixed", "pinned", "unread", "unverified") or not (inside or named):
            return left_out
        return replace(left_out, reason=f"{left_out.reason}; {REMEDY}")

    return replace(groups, excluded=[said(e) for e in groups.excluded], remedy=REMEDY) if wired else groups
