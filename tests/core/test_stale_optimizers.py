"""Optimizers that were built before the pruning, and networks that are trained in eval mode."""

import gc
import warnings
import weakref

import pytest
import torch
import torch_pruning as tp
from torch import nn

from helpers.psap_cases import TOTAL, make
from helpers.resconv_cases import X32, Basic
from tp_importance import (
    Budget,
    BudgetError,
    BudgetPruner,
    Refit,
    ResConvPruner,
    convert_to_resconv,
    fuse,
    prune,
    refitted_step,
    slice_classifier,
)
from tp_importance.core.stale_optimizers import replacing
from tp_importance.methods.resconv import remove_layers
from tp_importance.testing import class_loader, make_network

LOADER = class_loader()
HALF = Budget(macs=0.5)
STALE = r"SGD trains \d+ of \d+ parameters that pruning has replaced"


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.01)


def layers():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), Basic(), Basic(), nn.Conv2d(8, 2, 1))
    return convert_to_resconv(net.eval(), X32, a=0.5), X32


def by_prune(model, x):
    prune(model, x, LOADER, budget=HALF)


def by_history(model, x):
    other, _ = make_network("residual")
    first = BudgetPruner(other, x, importance=tp.importance.MagnitudeImportance(), budget=HALF)
    first.step()
    pruner = BudgetPruner(model, x, importance=tp.importance.MagnitudeImportance(), budget=HALF)
    pruner.load_pruning_history(first.pruning_history())


def by_host(model, x):
    head = [m for m in model.modules() if isinstance(m, nn.Linear)]
    host = tp.pruner.BasePruner(model, x, tp.importance.MagnitudeImportance(), pruning_ratio=0.5, ignored_layers=head)
    refitted_step(host, x, LOADER, refit=Refit("parallel", recalibrate=False))


def by_subtask(model, x):
    slice_classifier(model, [0, 1])


def by_nni(model, x):
    pytest.importorskip("nni")
    from nni_plugins import CATROPruner, speedup

    pruner = CATROPruner(model, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], loader=LOADER)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    optimizer = sgd(model)
    speedup(model, x, masks)
    return optimizer


CHANNELS = [by_prune, by_history, by_host, by_subtask, by_nni]
LAYERS = {
    "step": lambda model, x: ResConvPruner(model, x, budget=Budget(macs=0.7)).step(),
    "remove": lambda model, x: remove_layers(model, x, ["2.conv1"]),
    "fuse": lambda model, x: fuse(model),
}


@pytest.mark.parametrize("surgery", CHANNELS)
@pytest.mark.filterwarnings("ignore:.*has been overridden")
def test_stepping_an_optimizer_of_before_warns_once(surgery):
    model, x = make_network("residual")
    optimizer = sgd(model)
    optimizer = surgery(model, x) or optimizer
    assert_warns_once(optimizer)
    assert_silent(sgd(model))


@pytest.mark.parametrize("name", LAYERS)
def test_layers_that_are_gone_or_fused_count_too(name):
    model, x = layers()
    optimizer = sgd(model)
    LAYERS[name](model, x)
    assert_warns_once(optimizer)
    assert_silent(sgd(model))


def assert_warns_once(optimizer):
    with pytest.warns(UserWarning, match=STALE) as caught:
        optimizer.step()
    assert caught[0].filename == __file__
    assert_silent(optimizer)


def assert_silent(optimizer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def test_the_warning_counts_and_names_the_parameters():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    optimizer = torch.optim.AdamW(net.parameters())
    with replacing(net):
        net[1].weight = nn.Parameter(net[1].weight.detach()[:, :2])
    with pytest.warns(UserWarning) as caught:
        optimizer.step()
    assert str(caught[0].message) == (
        "AdamW trains 1 of 4 parameters that pruning has replaced (Sequential.1.weight): the pruned layers learn "
        "nothing. It was built before the pruning; build it afterwards, e.g. AdamW(model.parameters(), ...)"
    )


def test_a_second_surgery_warns_again():
    net = nn.Linear(4, 4)
    first = sgd(net)
    with replacing(net):
        net.weight = nn.Parameter(net.weight.detach()[:, :3])
    assert_warns_once(first)
    second = sgd(net)
    assert_silent(second)
    with replacing(net):
        net.weight = nn.Parameter(net.weight.detach()[:, :2])
    assert_warns_once(second)
    assert_silent(sgd(net))


def test_psap_carries_its_optimizers_over():
    run = make().train(TOTAL)
    run.pruner.finish()
    assert_silent(run.optimizer)


def test_a_pruning_that_fails_leaves_the_optimizer_in_use(monkeypatch):
    model, x = make_network("residual")
    optimizer = sgd(model)
    pruner = BudgetPruner(model, x, importance=tp.importance.MagnitudeImportance(), budget=HALF)
    monkeypatch.setattr("tp_importance.graph.tracing.Trace.ops", (1, 1))
    with pytest.raises(RuntimeError, match="planned were"):
        pruner.step()
    with pytest.raises(BudgetError):
        pruner.plan(Budget(macs=1e-6))
    assert_silent(optimizer)
    layered, x = layers()
    optimizer = sgd(layered)
    monkeypatch.setattr("tp_importance.methods.resconv.pruner.count_ops", lambda *args, **kwargs: (1, 1))
    with pytest.raises(RuntimeError, match="planned were"):
        ResConvPruner(layered, x, budget=Budget(macs=0.7)).step()
    assert_silent(optimizer)


def test_nothing_is_kept_alive():
    net = nn.Linear(3, 2)
    old = weakref.ref(net.weight)
    with replacing(net):
        net.weight = nn.Parameter(net.weight.detach()[:, :2].clone())
    gc.collect()
    assert old() is None


def test_the_look_costs_nothing_after_the_first(monkeypatch):
    model, x = make_network("residual")
    by_prune(model, x)
    optimizer, looks = sgd(model), []
    monkeypatch.setattr(
        "tp_importance.core.stale_optimizers._Replaced.name", lambda self, parameter: looks.append(parameter)
    )
    for _ in range(5):
        optimizer.step()
    assert len(looks) == len(list(model.parameters()))


# -- eval mode


EVAL = r"is trained in eval mode: \d+ batch norm or dropout layers \(0\.1, say\).*call model\.train\(\)"


def test_psap_warns_once_of_a_training_in_eval_mode():
    run = make()
    run.model.eval()
    x, y = run.loader[0]
    with pytest.warns(UserWarning, match=EVAL) as caught:
        for _ in range(3):
            run.optimizer.zero_grad()
            nn.functional.cross_entropy(run.model(x), y).backward()
            run.optimizer.step()
            run.pruner.step()
    assert len(caught) == 1 and caught[0].filename == __file__


def test_psap_is_silent_in_train_mode_also_with_frozen_batch_norms():
    run = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.train(2)
        run.model.train()
        run.model[0][1].eval()  # one of them on purpose
        x, y = run.loader[0]
        nn.functional.cross_entropy(run.model(x), y).backward()
        run.optimizer.step()
        run.pruner.step()


def test_resconv_warns_once_of_a_training_in_eval_mode():
    model, x = layers()
    pruner = ResConvPruner(model, x, budget=Budget(macs=0.7))
    optimizer = torch.optim.SGD(pruner.parameter_groups(), lr=0.01)
    with pytest.warns(UserWarning, match=r"is trained in eval mode: \d+ batch norm.*call model\.train\(\)") as caught:
        for _ in range(3):
            optimizer.step()
            pruner.regularize(optimizer)
    assert len(caught) == 1 and caught[0].filename == __file__
    model.train()
    fresh = ResConvPruner(model, x, budget=Budget(macs=0.7))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fresh.regularize(optimizer)


def test_a_network_without_batch_norms_may_train_in_eval_mode():
    model, x = make_network("no_bn")
    from tp_importance import PSAPPruner, PSAPSchedule

    pruner = PSAPPruner(model.eval(), x, budget=HALF, schedule=PSAPSchedule(prune_steps=1, pulse=1))
    optimizer = sgd(model)
    pruner.start(optimizer, total_steps=9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        pruner.step()
