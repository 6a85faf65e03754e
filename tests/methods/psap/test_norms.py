"""PSAP while a transformer or a network with group norms trains."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from helpers.norm_networks import norm_network
from helpers.psap_cases import SCHEDULE, adam
from tp_importance import Budget, PSAPPruner, count_ops
from tp_importance.budget import Cost

TOTAL = 16


def train(model, x, checkpointed=False, **options):
    """A few steps; the pruner, masked and in eval mode."""
    optimizer = adam(model)
    pruner = PSAPPruner(model, x, budget=Budget(macs=0.5), schedule=SCHEDULE, **options)
    pruner.start(optimizer, total_steps=TOTAL)
    labels = torch.arange(len(x)) % 3
    for _ in range(TOTAL):
        optimizer.zero_grad()
        model.train()
        out = checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
        nn.functional.cross_entropy(out, labels).backward()
        optimizer.step()
        pruner.step()
    model.eval()
    return pruner


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("name", ["prenorm", "postnorm", "rms", "groupnorm", "response"])
def test_the_pruned_network_is_the_masked_one(name, double):
    model, x, _ = norm_network(name, double=double)
    pruner = train(model, x)
    assert pruner.frozen
    assert any(pruner.masked[g.name] for g in pruner.groups if g.statistics)
    with torch.no_grad():
        masked, planned = model(x), pruner.cost
        report = pruner.finish()
        pruned = model(x)
    assert float((pruned - masked).abs().max() / masked.abs().max()) <= (1e-10 if double else 1e-5)
    assert Cost(*count_ops(model, x)) == report.cost == planned
    assert report.cost.macs <= 0.5 * pruner.dense.macs
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_checkpointed_training_takes_the_same_steps():
    outputs = []
    for checkpointed in (False, True):
        model, x, _ = norm_network("prenorm", double=True)
        pruner = train(model, x, checkpointed)
        outputs.append((model(x), pruner.masked))
        pruner.finish()
    torch.testing.assert_close(outputs[0][0], outputs[1][0], rtol=1e-9, atol=1e-9)
    assert outputs[0][1] == outputs[1][1]


@pytest.mark.parametrize("protect", [False, True])
def test_units_behind_norms_come_back(protect):
    """Pulses feel what masked channels of the stream would do, though the norms pass them over."""
    model, x, groups = norm_network("prenorm")
    stream = next(g for g in groups if g.statistics)
    with torch.no_grad():
        for m in stream.producers:
            model.get_submodule(m.name).weight[5] *= 1e-3  # the first one that a norm of filters takes
        for m in stream.consumers:
            model.get_submodule(m.name).weight[:, 5] *= 30
    pruner = train(model, x, protect=protect)
    assert (5 in pruner.masked[stream.name]) != protect
    pruner.finish()
