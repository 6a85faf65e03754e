"""Which classes are rewritten, by which function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..checkpoints.checkpoint import register_rebuilt
from ..graph.wired import WIRED
from .heads import linear
from .multihead import ExplicitMultiheadAttention, explicit_multihead
from .rotary import explicit_positions, explicit_rotary
from .spatial import explicit_spatial
from .tokens import (
    ExplicitChannelAttention,
    ExplicitClassAttention,
    ExplicitGroupedAttention,
    ExplicitTokenAttention,
    explicit_channels,
    explicit_class_token,
    explicit_groups,
    explicit_reduced,
    explicit_tokens,
)
from .windows import (
    ExplicitBiasedAttention,
    ExplicitMaskedAttention,
    ExplicitWindowAttention,
    explicit_biased,
    explicit_cosine,
    explicit_shared_bias,
    explicit_windows,
)

__all__ = ["REWRITERS", "Rewriter"]

Rewriter = Callable[[Any], nn.Module]
"""Makes the new module of an old one, which it does not change; raises ``ValueError`` with the reason if it cannot."""


def explicit_linear(old: Any) -> nn.Module:
    """The same layer with its weight the usual way round.

    Args:
        old: a ``Conv1D`` of transformers.
    """
    turned = old.weight.detach().t().clone(memory_format=torch.contiguous_format)
    return linear(nn.Parameter(turned, requires_grad=old.weight.requires_grad), old.bias)


REWRITERS: dict[str, Rewriter] = {
    "torch.nn.modules.activation.MultiheadAttention": explicit_multihead,
    "torchvision.models.swin_transformer.ShiftedWindowAttention": explicit_windows,
    "torchvision.models.swin_transformer.ShiftedWindowAttentionV2": explicit_windows,
    "torchvision.models.maxvit.RelativePositionalMultiHeadAttention": explicit_biased,
    "transformers.pytorch_utils.Conv1D": explicit_linear,
    "timm.models.swin_transformer_v2.WindowAttention": explicit_cosine,
    "timm.models.beit.Attention": explicit_shared_bias,
    "timm.models.eva.EvaAttention": explicit_rotary,
    "timm.models.vision_transformer_relpos.RelPosAttention": explicit_positions,
    "timm.models.pvt_v2.Attention": explicit_reduced,
    "timm.models.twins.GlobalSubSampleAttn": explicit_reduced,
    "timm.models.twins.LocallyGroupedAttn": explicit_groups,
    "timm.models.metaformer.Attention": explicit_tokens,
    "timm.models.davit.WindowAttention": explicit_tokens,
    "timm.models.crossvit.CrossAttention": explicit_class_token,
    "timm.models.cait.ClassAttn": explicit_class_token,
    "timm.models.xcit.XCA": explicit_channels,
    "timm.models.edgenext.CrossCovarianceAttn": explicit_channels,
    "ultralytics.nn.modules.block.Attention": explicit_spatial,
    "ultralytics.nn.modules.block.AAttn": explicit_spatial,
}
"""By the name of the class, so that nothing has to be imported or installed."""

WIRED.update(REWRITERS)

for _cls in (
    *(ExplicitMultiheadAttention, ExplicitWindowAttention, ExplicitBiasedAttention, ExplicitMaskedAttention),
    *(ExplicitClassAttention, ExplicitChannelAttention, ExplicitGroupedAttention, ExplicitTokenAttention),
):
    register_rebuilt(_cls)
