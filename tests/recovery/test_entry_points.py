"""Recovery where networks are pruned: ResConvPruner and prune_trial."""

import copy

import pytest
import torch
from torch import nn

from helpers.states import same_state, state
from tp_importance import Budget, Recovery, ResConvPruner
from tp_importance.automl import prune_trial
from tp_importance.errors import SearchSpaceError
from tp_importance.methods.resconv.report import LayerReport
from tp_importance.pruning import registry

HALF = Budget(macs=0.5)
QUICK = Recovery(epochs=30, lr=5e-3, augment=None, autocast=False)


def plain():
    """Five convolutions of equal width, so that layers can go as well as channels."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    for _ in range(4):
        layers += [nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Conv2d(8, 4, 1)).train()
    with torch.no_grad():
        for _ in range(40):  # batch norms that fit
            model(images(256, seed=2))
    return model.eval()


def images(n=128, seed=0):
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


LOADER, X = list(images().split(32)), images(2)


@torch.no_grad()
def error(model, dense):
    x = images(64, seed=1)
    return float((model(x) - dense(x)).square().mean())


def broken(batch, generator):
    raise RuntimeError("broken")


@pytest.mark.parametrize("fuse", [True, False])
def test_removed_layers(fuse):
    dense = plain()
    alone, taught = copy.deepcopy(dense), copy.deepcopy(dense)
    options = {"budget": HALF, "importance": "output"}
    ResConvPruner(alone, X, LOADER, **options).step(fuse=fuse, refit="batchnorm")
    report = ResConvPruner(taught, X, LOADER, **options).step(fuse=fuse, refit="batchnorm", recover=QUICK)
    assert len(report.removed) > 0 and report.recovery.after < report.recovery.before
    assert error(taught, dense) < 0.8 * error(alone, dense)
    assert "recovered: 30 epochs" in str(report) and LayerReport.from_dict(report.to_dict()) == report


def test_removed_layers_come_back_if_the_recovery_fails():
    model = plain()
    pruner = ResConvPruner(model, X, LOADER, budget=HALF, importance="output")
    before, output = state(model), model(X)
    with pytest.raises(RuntimeError, match="broken"):
        pruner.step(refit=True, recover=Recovery(augment=broken, autocast=False))
    assert same_state(model, before) and torch.equal(model(X), output) and not pruner.history
    assert pruner.step(refit=True).recovery is None
    with pytest.raises(ValueError, match="recover= needs images: pass a loader"):
        ResConvPruner(plain(), X, budget=HALF).step(recover=True)


@pytest.mark.parametrize(
    "params", [{"method": "l1"}, {"method": "resconv", "resconv.importance": "output"}, {"method": "psap_training"}]
)
def test_trials(params):
    def train(model, *, start=None, step=None):
        if start is not None:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
            start(optimizer, total_steps=10)
            for batch in (LOADER * 3)[:10]:
                model(batch).square().mean().backward()
                optimizer.step()
                step()

    dense = plain()
    before, options = state(dense), {"example_inputs": X, "loader": LOADER, "budget": HALF, "latency_seconds": None}
    options |= {"evaluate": lambda model: -error(model, dense), "train": train}
    alone = prune_trial(dense, params, **options)
    taught = prune_trial(dense, params, recover=QUICK, **options)
    assert taught["macs"] == alone["macs"] and taught["default"] > 0.8 * alone["default"]
    assert same_state(dense, before)


def test_trials_without_images():
    with pytest.raises(ValueError, match="recover= needs images"):
        prune_trial(plain(), {"method": "l1"}, example_inputs=X, evaluate=error, budget=HALF, recover=True)


def test_trials_of_a_method_that_recovers_nothing(monkeypatch):
    def prune(job):
        ResConvPruner(job.model, X, job.loader, budget=job.whole_budget("forgetful")).step()

    monkeypatch.setitem(registry._METHODS, "forgetful", registry.Method("forgetful", prune=prune))
    options = {"example_inputs": X, "loader": LOADER, "budget": HALF, "evaluate": lambda model: 0.0}
    assert prune_trial(plain(), {"method": "forgetful"}, **options)["default"] == 0
    with pytest.raises(SearchSpaceError, match=r"'forgetful' recovers nothing: its prune\(job\) must call"):
        prune_trial(plain(), {"method": "forgetful"}, recover=QUICK, **options)
