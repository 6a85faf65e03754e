"""Modules of libraries whose code computes the sizes of attention heads from a width: no head of theirs can go."""

from __future__ import annotations

from dataclasses import replace

from .groups import Excluded, PrunableGroups

__all__ = ["REMEDY", "WIRED", "with_remedies"]

WIRED = frozenset(
    {
        "torch.nn.modules.activation.MultiheadAttention",
        "torchvision.models.swin_transformer.ShiftedWindowAttention",
        "torchvision.models.swin_transformer.ShiftedWindowAttentionV2",
        "torchvision.models.maxvit.RelativePositionalMultiHeadAttention",
        "transformers.pytorch_utils.Conv1D",
        "timm.models.swin_transformer_v2.WindowAttention",
        "timm.models.beit.Attention",
        "timm.models.pvt_v2.Attention",
        "timm.models.twins.GlobalSubSampleAttn",
        "timm.models.twins.LocallyGroupedAttn",
        "timm.models.metaformer.Attention",
        "timm.models.davit.WindowAttention",
        "timm.models.crossvit.CrossAttention",
        "timm.models.cait.ClassAttn",
        "timm.models.xcit.XCA",
        "timm.models.edgenext.CrossCovarianceAttn",
        "ultralytics.nn.modules.block.Attention",
        "ultralytics.nn.modules.block.AAttn",
    }
)
"""Names of their classes; the package :mod:`tp_importance.attention` knows how to rewrite them."""

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
