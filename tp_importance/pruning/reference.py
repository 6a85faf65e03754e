"""The network that batch norms are compared with when they follow a surgery."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from torch import nn

from ..graph.groups import PrunableGroups
from ..statistics.dense_reference import DenseReference
from ..statistics.running_statistics import has_batch_norm, is_calibrated

__all__ = ["reference_after"]


def reference_after(
    model: nn.Module,
    groups: PrunableGroups,
    removed: Mapping[str, Sequence[int]],
    known: DenseReference | None,
    *,
    needed: bool,
) -> DenseReference | None:
    """The network that batch norms are compared with, and what of it is left when ``removed`` has gone.

    It is the network as given, or as somebody else, training say, has left it since the last step. A later step may
    want it; so it is kept, if the network can be copied, where it is not ``needed`` now.

    Args:
        model: the network before the surgery.
        groups: its groups.
        removed: units that go, per group name.
        known: the reference of the last step.
        needed: whether this step wants it.

    Returns:
        ``None`` if the network has no batch norms, or cannot be copied and need not.
    """
    if not has_batch_norm(model):
        return None
    if known is None or not known.is_of(model):
        try:
            known = DenseReference.of(model)
        except Exception:
            if needed:
                raise
            return None
    layers, gone = dict(model.named_modules()), defaultdict[str, list[int]](list)
    for group in groups:
        for m in group.members:
            if m.kind == "passthrough" and m.role == "out" and is_calibrated(layers.get(m.name)):
                gone[m.name] += m.positions(removed.get(group.name, ())).tolist()
    return known.after(gone)
