"""Pruning leaves memory formats and the gradients of what is not cut."""

import copy

import pytest
import torch
import torch_pruning as tp
from torch import nn

from tp_importance import (
    Budget,
    BudgetPruner,
    PSAPPruner,
    Refit,
    load_pruned,
    prunable_groups,
    prune,
    recalibrate_batchnorm,
    refitted_step,
    save_pruned,
)
from tp_importance.testing import class_loader, make_network

HALF, DATA, LAST = Budget(macs=0.5), class_loader(32), torch.channels_last
L1 = tp.importance.MagnitudeImportance(p=1)


def host_step(model, x):
    pruner = tp.pruner.BasePruner(model, x, L1, pruning_ratio=0.5, ignored_layers=[model[3][2]])
    refitted_step(pruner, x, DATA, refit=Refit("parallel", recalibrate=False))


def while_training(model, x):
    pruner = PSAPPruner(model, x, budget=HALF)
    pruner.start(torch.optim.SGD(model.parameters(), lr=0.0), total_steps=1)
    pruner.finish(at_once=True)


def history(model, x):
    twin = BudgetPruner(copy.deepcopy(model), x, importance=L1, budget=HALF)
    twin.step()
    BudgetPruner(model, x, importance=L1, budget=HALF).load_pruning_history(twin.pruning_history())


def one_by_one(model, x):
    prune(model, x, DATA, budget=HALF, refit=Refit("sequential", memory_limit=1))


CUTS = {
    "step": lambda m, x: BudgetPruner(m, x, importance=L1, budget=HALF).step(),
    "sequential": lambda m, x: prune(m, x, DATA, budget=HALF),
    "parallel": lambda m, x: prune(m, x, DATA, budget=HALF, refit="parallel"),
    "no refit": lambda m, x: prune(m, x, DATA, budget=HALF, refit="batchnorm"),
    "one by one": one_by_one,
    "taylor": lambda m, x: prune(m, x, DATA, budget=HALF, method="taylor"),
    "psap": lambda m, x: prune(m, x, DATA, budget=HALF, method="psap"),
    "PSAPPruner": while_training,
    "refitted_step": host_step,
    "history": history,
}
LOOKS = {
    "groups": lambda m, x: prunable_groups(m, x),
    "plan": lambda m, x: BudgetPruner(m, x, importance=L1, budget=HALF).plan(),
    "norms": lambda m, x: recalibrate_batchnorm(m, DATA),
}


def with_gradients():
    model, x = make_network("residual")
    model = model.to(memory_format=LAST)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    return model, x


def assert_last(model):
    weights = {n: p for n, p in model.named_parameters() if p.dim() == 4}
    assert weights and all(p.is_contiguous(memory_format=LAST) for p in weights.values())


@pytest.mark.parametrize("name", [*CUTS, *LOOKS])
def test_layout_and_gradients(name):
    model, x = with_gradients()
    before = {n: (p, p.grad, p.grad.clone()) for n, p in model.named_parameters()}
    ({**CUTS, **LOOKS})[name](model, x)
    assert_last(model)
    kept = 0
    for key, p in model.named_parameters():
        old, gradient, values = before[key]
        if p.shape != old.shape:
            assert p.grad is None and p is not old, key
        else:
            kept += 1
            assert p is old and p.grad is gradient and torch.equal(p.grad, values), key
    assert 0 < kept < len(before) if name in CUTS else kept == len(before)


def test_contiguous_stays_contiguous():
    model, x = make_network("residual")
    prune(model, x, DATA, budget=HALF)
    assert all(p.is_contiguous() for p in model.parameters())


def test_volumes():
    layers = [nn.Conv3d(2, 8, 3), nn.ReLU(), nn.Conv3d(8, 8, 3), nn.ReLU(), nn.Conv3d(8, 2, 1)]
    model = nn.Sequential(*layers).to(memory_format=torch.channels_last_3d)
    BudgetPruner(model, torch.randn(1, 2, 8, 8, 8), importance=L1, budget=HALF).step()
    for i in (0, 2):
        assert model[i].weight.is_contiguous(memory_format=torch.channels_last_3d)
        assert not model[i].weight.is_contiguous()


def test_a_refused_step_keeps_all_gradients():
    model, x = with_gradients()
    before = [(p, p.grad, p.grad.clone()) for p in model.parameters()]
    with pytest.raises(ValueError):
        prune(model, x, [(torch.full_like(images, torch.nan), y) for images, y in DATA], budget=HALF)
    assert all(p.grad is g and p.grad.equal(v) for p, g, v in before)
    assert all(p is q for p, (q, _, _) in zip(model.parameters(), before, strict=True))


def test_through_a_file(tmp_path):
    model, x = with_gradients()
    prune(model, x, DATA, budget=HALF)
    save_pruned(model, tmp_path / "net.pt")
    loaded = load_pruned(lambda: make_network("residual")[0].to(memory_format=LAST), tmp_path / "net.pt")
    assert_last(loaded)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
