"""Train a pruned network to give what the dense one gives, on the samples that are there anyway; no labels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..core.arguments import checked_model, require_writable
from ..core.copies import copied
from ..core.devices import reference_tensor
from ..core.forward import ForwardFn
from ..core.guards import gradients_kept, preserved, transaction
from ..core.progress import shown
from ..core.untouched import generators_restored
from .report import RecoveryReport
from .settings import Recovery
from .speed import without_fast_path
from .training import Training

__all__ = ["recover"]


@torch.inference_mode(False)  # what is made there takes no gradient
def recover(
    model: nn.Module,
    dense: nn.Module,
    loader: Iterable[Any],
    settings: Recovery | bool | float = True,
    *,
    forward_fn: ForwardFn | None = None,
    progress: bool | None = None,
) -> RecoveryReport:
    r"""Train a pruned network, in place, to give what the dense one gives on the loader's samples.

    With the outputs :math:`z` of the pruned and :math:`\bar z` of the dense network, and their features :math:`f_l`
    and :math:`\bar f_l` inside, where their shapes agree,

    .. math:: L = \sum_z \Bigl( \frac{\lVert z - \bar z \rVert^2}{\lVert \bar z \rVert^2}
              + T^2 \operatorname{KL}(\bar z, z) \Bigr)
              + \frac{\lambda}{n} \sum_{l=1}^n \frac{\lVert f_l - \bar f_l \rVert^2}{\lVert \bar f_l \rVert^2}

    (KL where an output may be logits) is minimised by AdamW. Features are found by themselves: outputs of blocks, of
    single layers where there are no blocks. Some of the samples are held out; the state with the least loss on them is
    kept, so that the network is never worse by that measure than before. No labels are used.

    Batch norms normalise by the batch and their statistics follow, in batches of at least 8 samples, unless the loss
    rises tenfold by that, because the statistics are not those of the samples. Everything else is in eval mode. Frozen
    parameters stay, and statistics of batch norms that are frozen. Modes, flags, hooks and formats of the network are
    as before afterwards, and after any exception, Ctrl-C included, its values as well.

    Args:
        model: the pruned network.
        dense: the network before pruning (a copy made then; ``OneShot.pruner`` has one); is not changed.
        loader: iterable of batches; read once, and all kept in memory.
        settings: a :class:`Recovery`, ``True`` for the defaults, or a number of minutes.
        forward_fn: ``forward_fn(model, batch)``.
        progress: show a progress bar; by default in a terminal.

    Returns:
        The :class:`RecoveryReport`.

    Raises:
        TypeError: if a network is none, compiled or wrapped, or the loader is none.
        ValueError: if nothing can be trained or compared, if the outputs of the networks have different shapes, for a
            loader without batches, and for samples on which the dense network gives values that are not finite.

    Example:
        >>> import copy
        >>> from tp_importance import Budget, Recovery, prune, recover
        >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
        <...>
        >>> conv = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()
        >>> net = nn.Sequential(*conv, nn.Flatten(), nn.Linear(128, 4))
        >>> dense, loader = copy.deepcopy(net), [torch.randn(32, 3, 8, 8) for _ in range(4)]
        >>> _ = prune(net, torch.randn(1, 3, 8, 8), loader, budget=Budget(macs=0.5))
        >>> report = recover(net, dense, loader, Recovery(epochs=20))
        >>> report.after < report.before
        True

    References:
        Hinton et al. 2015 (arXiv 1503.02531) and Romero et al. 2015 (arXiv 1412.6550) for the losses; the recipe for
        a few hundred samples is ours, after MiR (arXiv 2201.02620) and PRACTISE (arXiv 2202.07861).
    """
    how = Recovery.of(settings)
    if how is None:
        raise TypeError(f"settings={settings!r} recovers nothing; give a Recovery, a number of minutes or True")
    checked_model(model)
    checked_model(dense, "dense")
    if dense is model:
        raise ValueError("model and dense are the same network: pass a copy of the network made before pruning")
    require_writable(model)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("all parameters are frozen: set requires_grad of those that may be trained")
    teacher, like = copied(dense).eval().requires_grad_(False), reference_tensor(model)
    if like is not None:
        teacher.to(like.device)
    values = (*model.parameters(), *model.buffers())
    with gradients_kept(model), preserved(model), transaction(model, values), generators_restored(model):
        with shown(progress), without_fast_path():
            return Training(model, teacher, loader, how, forward_fn).run()
