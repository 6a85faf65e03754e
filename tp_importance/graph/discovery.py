"""The groups of a network that can be pruned safely."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from torch import nn

from ..core.arguments import checked_model
from ..core.collector import rarely_collected
from ..core.progress import phase, shown
from .classes import build_groups, other_answers
from .groups import PrunableGroups, Verifier
from .labels.attention import Attention, checked_attention
from .modes import training_pass
from .option_checks import check_options
from .trace_options import TraceOptions
from .tracing import trace
from .verify import Passed, verify_groups
from .wired import with_remedies

__all__ = ["prunable_groups"]

MAX_ANSWERS = 3
"""How often other answers to what one pass leaves open are tried, each at the cost of a verification."""


@rarely_collected()
def prunable_groups(
    model: nn.Module,
    example_inputs: Any,
    *,
    ignored_layers: Sequence[nn.Module | nn.Parameter | type] | None = None,
    attention: Attention = "heads",
    num_heads: Mapping[nn.Module, int] | None = None,
    unwrapped_parameters: Sequence[tuple[nn.Parameter, int]] | None = None,
    customized_pruners: Mapping[Any, Any] | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    output_transform: Callable[[Any], Any] | None = None,
    allow_stale: bool = False,
    count_attention: bool = True,
    verify: bool | Verifier = True,
    progress: bool | None = None,
) -> PrunableGroups:
    """Find the coupled channel groups of any network, and keep only those that can be pruned safely.

    The network runs once, and labels run along that say which channel an entry of a tensor belongs to: what moves
    data moves them, what sums over channels or adds tensors ties them. Left out, each with its reason, are: the
    network's outputs; groups with an ignored layer; channels that a softmax, a sum or an operation that nobody knows
    mixes; channels that meet padding, constants or the
    network's input, which stay as they are; groups of a single unit; groups that some layer reads in training mode only
    (an auxiliary head, which the surgery would not follow); and every group for which removal is not the same as
    masking. The last test (``verify``) prunes a copy and compares it, at every convolution and linear layer and at the
    output, with the masked original: no pass tells whether code such as ``x[:, :32]`` follows a smaller tensor.

    Args:
        model: the network; it is not changed.
        example_inputs: tensor, tuple or dict, batch dimension first.
        ignored_layers: modules (with everything inside), parameters or module types that must keep their outputs.
        attention: what a unit of attention is: ``"heads"``, ``"dims"`` (a dimension of every head), or ``"none"``: its
            channels stay. What has one head only has no heads to lose.
        num_heads: ``{qkv projection: heads}`` as in Torch-Pruning: in these layers a unit is one dimension of every
            head.
        unwrapped_parameters: ``[(parameter, dim), ...]`` as in Torch-Pruning.
        customized_pruners: as in Torch-Pruning.
        forward_fn: ``forward_fn(model, example_inputs)``; default calls the model.
        output_transform: applied to the network's output before tracing.
        allow_stale: also offer channels that layers read in training mode only. These layers keep their old width, and
            the network fails in training mode once it is pruned.
        count_attention: whether costs contain the products of data with data, QKᵀ and AV, at the positions of the
            example.
        verify: compare masked and pruned copies (default). Costs two deep copies and two passes if all groups are safe,
            and as much again for every test that it takes to find those that are not. Or a function that knows the
            verdict: ``verify(groups, example_inputs) → reason per unsafe group``.
        progress: show progress bars; by default in a terminal.

    Returns:
        :class:`PrunableGroups`.

    Raises:
        TracingError: if the network cannot be traced.
        TypeError: for a model that is none, and for options of the wrong type.
        ValueError: for layers and parameters of another network in the options; if layers do not run in eval mode, and
            what they read in training mode cannot be found out.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> groups = prunable_groups(net, torch.randn(1, 3, 8, 8))
        >>> [(g.name, g.width) for g in groups], [(e.kind, e.reason) for e in groups.excluded]
        ([('0', 8)], [('output', "produces the network's output")])
    """
    check_options(
        checked_model(model),
        ignored_layers=ignored_layers,
        num_heads=num_heads,
        unwrapped_parameters=unwrapped_parameters,
        customized_pruners=customized_pruners,
        forward_fn=forward_fn,
        output_transform=output_transform,
        verify=verify,
    )
    checked_attention(attention)
    names = {module: name for name, module in model.named_modules()}
    options = TraceOptions(
        forward_fn,
        output_transform,
        unwrapped_parameters,
        customized_pruners,
        [p for p in ignored_layers or () if isinstance(p, nn.Parameter)],
        attention=attention,
        with_heads=tuple(names[m] for m in num_heads or () if m in names),
        count_attention=count_attention,
    )
    with phase("tracing", progress=progress) as running:
        traced = trace(model, example_inputs, options)
        in_training = cache(lambda: training_pass(model, example_inputs, options, usual=traced.reads))

        def answered(choices: tuple[int, ...]) -> PrunableGroups:
            chosen = replace(options, choices=choices)
            groups = build_groups(traced, ignored_layers, num_heads, chosen)
            if allow_stale or not len(groups):
                return groups
            return groups.exclude(in_training().reasons(groups), "training")

        groups = answered(())
        running.note(groups=len(groups), left_out=len(groups.excluded))
    if not verify or not len(groups):
        return with_remedies(groups)
    with shown(progress):
        if callable(verify):
            return with_remedies(groups.exclude(_by_user(verify, groups, example_inputs)))
        return with_remedies(_verified(groups, example_inputs, answered))


def _by_user(verify: Verifier, groups: PrunableGroups, example_inputs: Any) -> Mapping[str, str]:
    """What a function of the user's has found."""
    reasons = verify(groups, example_inputs)
    if not isinstance(reasons, Mapping) or not all(isinstance(reason, str) for reason in reasons.values()):
        raise TypeError(
            f"verify must return a dict {{name of an unsafe group: reason}}, which may be empty, not {reasons!r}"
        )
    return reasons


def _verified(
    groups: PrunableGroups, example_inputs: Any, answered: Callable[[tuple[int, ...]], PrunableGroups]
) -> PrunableGroups:
    """The groups that stand the test; where one fails that an open question is about, the next answer is tried."""
    passed = Passed()
    for _ in range(MAX_ANSWERS):
        refused = verify_groups(groups, example_inputs, passed=passed)
        choices = other_answers(groups, refused)
        if choices is None:
            return groups.exclude(refused)
        groups = answered(choices)
    return groups.exclude(verify_groups(groups, example_inputs, passed=passed))
