"""One trial: budgets, methods, weights, errors."""

import pytest
import torch

from helpers.automl_cases import BATCHES, X, network, run, weight_sum
from helpers.states import state
from tp_importance import BudgetError, count_ops, prunable_groups
from tp_importance.automl import (
    METHODS,
    BudgetProblem,
    SearchSpace,
    search_space,
)
from tp_importance.errors import SearchSpaceError
from tp_importance.testing.networks import plain, residual


def train(model, *, start=None, step=None):
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    model.train()
    if start is not None:
        start(optimizer, total_steps=8)
    for i in range(8):
        x, y = BATCHES[i % 2]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        if step is not None:
            step()


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_keeps_the_budget_and_leaves_the_model_alone(name):
    model = network(plain if name == "resconv" else residual)
    if name == "resconv":
        model = torch.nn.Sequential(
            model[0],
            *[
                torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, padding=1), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
                for _ in range(3)
            ],
            torch.nn.AdaptiveAvgPool2d(1),
            torch.nn.Flatten(),
            torch.nn.Linear(8, 4),
        ).eval()
    before = state(model)
    dense, generator = count_ops(model, X), torch.get_rng_state()
    found = run(model, {"method": name}, train=train if METHODS[name].needs_training else None, latency_seconds=0.01)
    assert 0 < found["macs"] <= 0.5 * dense[0]
    assert found["latency"] > 0 and set(found) == {"default", "macs", "params", "latency"}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert torch.equal(generator, torch.get_rng_state())
    assert (
        run(model, {"method": name}, train=train if METHODS[name].needs_training else None)["default"]
        == found["default"]
    )


def test_widths_ratios_and_weights():
    model = network()
    groups = prunable_groups(model, X)
    kept = []
    names = list(groups.widths)
    keep = lambda net: kept.append(prunable_groups(net, X).widths)  # noqa: E731
    run(model, {f"width:{n}": w // 2 for n, w in groups.widths.items()}, budget=None, keep=keep)
    assert kept[-1] == {n: w // 2 for n, w in groups.widths.items()}
    run(model, {f"ratio:{names[0]}": 0.5}, budget=None, keep=keep)
    assert kept[-1] == {**groups.widths, names[0]: groups.widths[names[0]] // 2}
    dense = count_ops(model, X)[0]
    for family in ("ratio", "weight"):
        small, large = ({f"{family}:{names[0]}": v} for v in ((0.8, 0.1) if family == "ratio" else (0.1, 10.0)))
        assert run(model, small, keep=keep)["macs"] <= dense / 2
        assert run(model, large, keep=keep)["macs"] <= dense / 2
        assert kept[-2][names[0]] < kept[-1][names[0]]


@pytest.mark.parametrize(
    ("params", "error", "match"),
    [
        ({"method": "catroo"}, SearchSpaceError, "no method is called 'catroo'"),
        ({"ratio:nowhere": 0.5}, SearchSpaceError, "no group is called 'nowhere'"),
        ({"ratio:0.0": 1.5}, SearchSpaceError, "ratio:0.0=1.5 must be a fraction"),
        ({"weight:0.0": 0}, SearchSpaceError, "above 0"),
        ({"width:0.0": 2.5}, SearchSpaceError, "whole number"),
        ({"width:0.0": 3, "ratio:0.0": 0.5}, SearchSpaceError, "one of them"),
        ({"depth": 3}, SearchSpaceError, "'depth' is not understood"),
        ({"method": "catro", "catro.clas_weight": 1}, SearchSpaceError, "class_weight"),
        ({"method": "resconv", "ratio:0.0": 0.5}, SearchSpaceError, "takes no widths"),
        ({"method": "psap_training"}, ValueError, "pass train="),
        ({"budget:macs": 0.0001}, BudgetError, "cannot be reached"),
        ({"allocator": "gready"}, ValueError, "allocator='gready' is unknown; choose from .*'default'.*'program'"),
        ({"refit": "serial"}, SearchSpaceError, "refit='serial' is unknown"),
        (
            {"method": "resconv", "refit": "parallel"},
            SearchSpaceError,
            "takes no refit=.parallel.; give refit=.batchnorm. or refit=.sequential.",
        ),
    ],
)
def test_errors_carry_the_parameters(params, error, match):
    model = network()
    with pytest.raises(error, match=match) as caught:
        run(model, params)
    assert str(params) in caught.value.__notes__[0]


def test_widths_over_the_budget_and_no_budget():
    model = network()
    full = {f"width:{n}": w for n, w in prunable_groups(model, X).widths.items()}
    with pytest.raises(BudgetError, match="more than the limit"):
        run(model, full)
    with pytest.raises(SearchSpaceError, match="no budget"):
        run(model, {"method": "catro"}, budget=None)


@pytest.mark.parametrize("name", ["obs", "magnitude", "l1", "itpruner"])
def test_a_trial_refits_if_asked_to(name):
    """The refit brings the outputs of the pruned network closer to those of the dense one."""
    model = network()
    dense, kept = model(BATCHES[0][0]).detach(), []

    def error(net):
        kept.append(net)
        with torch.no_grad():
            return float((net(BATCHES[0][0]) - dense).square().mean())

    plain = run(model, {"method": name}, evaluate=error)
    assert name != "obs" or run(model, {"method": name, "refit": "batchnorm"}, evaluate=error) == plain
    found = {}
    for mode in ("parallel", "sequential"):
        found[mode] = run(model, {"method": name, "refit": mode}, evaluate=error)
        if name == "obs":  # who asks for it is the same for all
            assert run(model, {"method": name}, evaluate=error, refit=mode) == found[mode]
            assert run(model, {"method": name, "refit": "batchnorm"}, evaluate=error, refit=mode) == plain
    assert found["sequential"]["default"] < plain["default"]
    assert all(f["macs"] == plain["macs"] for f in found.values())  # the widths are the same


def test_models_and_budgets_that_are_none():
    with pytest.raises(TypeError, match=r"budget must be a Budget, e\.g\. Budget\(macs=0\.5\), not 0\.5"):
        run(network(), {}, budget=0.5)
    with pytest.raises(TypeError, match="budget must be a Budget"):
        BudgetProblem.prepare(network(), X, BATCHES, budget=0.5)
    with pytest.raises(TypeError, match=r"use model\._orig_mod"):
        run(torch.compile(network()), {})
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, not function"):
        run(weight_sum, {})


def test_a_refit_comes_before_training_and_needs_data():
    model, order = network(), []
    trained = run(
        model,
        {"refit": "parallel"},
        train=lambda net, **_: order.append(weight_sum(net)),
        evaluate=lambda net: order.append(weight_sum(net)) or 0.0,
    )
    refitted = run(model, {"refit": "parallel"})["default"]
    assert order == [refitted, refitted] and trained["default"] == 0.0 and refitted != run(model, {})["default"]
    with pytest.raises(ValueError, match="refit='parallel' needs data: pass loader="):
        run(model, {"refit": "parallel"}, loader=None)


def test_the_refit_is_a_choice_of_the_space_only_if_asked_for():
    others = {"allocators": ["default"], "methods": ["obs"], "budget": {"macs": (0.2, 0.8)}}
    default, space = search_space(**others), search_space(**others, refit=[None, "parallel", "sequential"])
    names = [p.name for p in space.parameters]
    assert [n for n in names if n != "refit"] == [p.name for p in default.parameters]
    assert space.to_nni()["refit"] == {"_type": "choice", "_value": [None, "parallel", "sequential"]}
    assert SearchSpace.from_dict(space.to_dict()) == space
    params = {"method": "obs", "obs.class_weight": 0.5, "allocator": "default", "budget:macs": 0.5, "refit": None}
    assert space.check(params) == params
    assert run(network(), params)["macs"] == run(network(), {**params, "refit": "parallel"})["macs"]


def test_ignored_layers_are_those_of_the_copy():
    model = network()
    group = next(iter(prunable_groups(model, X)))
    layer = model.get_submodule(group.producers[0].name)
    kept = []
    run(model, {}, ignored_layers=[layer], keep=kept.append)
    assert kept[0].get_submodule(group.producers[0].name).out_channels == layer.out_channels
