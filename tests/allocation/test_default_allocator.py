"""One rule says where widths come from: the same for a name, an object, a pruner, a trial and both hosts."""

import copy

import pytest
import torch
import torch_pruning as tp
from torch import nn

from tp_importance import (
    Budget,
    BudgetPruner,
    CATROImportance,
    ITPrunerImportance,
    OBSImportance,
    PSAPImportance,
    prune,
)
from tp_importance.allocation.registry import default_allocator
from tp_importance.automl import RandomImportance, prune_trial
from tp_importance.pruning.registry import METHODS
from tp_importance.statistics.gradients import loss_gradients
from tp_importance.testing import class_loader, make_network, same_values

HALF = Budget(macs=0.5)
LOADER = class_loader(32)
RULE = {
    "catro": (CATROImportance, "greedy"),
    "obs": (OBSImportance, "greedy"),
    "itpruner": (ITPrunerImportance, "program"),
    "psap": (PSAPImportance, "uniform"),
    "l1": (lambda: tp.importance.MagnitudeImportance(p=1), "uniform"),
    "fpgm": (tp.importance.FPGMImportance, "uniform"),
    "taylor": (tp.importance.TaylorImportance, "greedy"),
    "random": (RandomImportance, "uniform"),
}


@pytest.mark.parametrize("name", RULE)
def test_all_routes_give_the_same_network(name):
    make, allocator = RULE[name]
    assert default_allocator(make()) == allocator
    routes = []

    def network():
        model, x = make_network("residual")
        routes.append(model.eval())
        return model, x

    for choice in (None, "default", allocator):
        model, x = network()
        prune(model, x, LOADER, budget=HALF, method=name, refit="batchnorm", allocator=choice)
    model, x = network()
    with loss_gradients(model, LOADER):
        prune(model, x, LOADER, budget=HALF, method=make(), refit="batchnorm")
    model, x = network()
    with loss_gradients(model, LOADER):
        BudgetPruner(model, x, LOADER, importance=make(), budget=HALF).step(refit="batchnorm")
    model, x = network()
    options = {"example_inputs": x, "loader": LOADER, "evaluate": lambda net: 0.0, "latency_seconds": None}
    found = []
    prune_trial(model, {"method": name}, budget=HALF, keep=found.append, **options)
    routes[-1] = found[0]
    assert all(same_values(routes[0], other) for other in routes[1:])


def test_every_channel_method_is_covered():
    assert {n for n, m in METHODS.items() if m.make is not None} == {*RULE, "l2", "magnitude"}


def test_nni_takes_the_same_widths():
    nni_plugins = pytest.importorskip("nni_plugins")
    for importance, allocator in ((PSAPImportance(), "uniform"), (OBSImportance(), "greedy")):
        plans = []
        for choice in ({}, {"allocator": "default"}, {"allocator": allocator}):
            model, x = make_network("residual")
            pruner = nni_plugins.ImportancePruner(
                model,
                [{"op_types": ["Conv2d"]}],
                loader=LOADER,
                importance=copy.deepcopy(importance),
                budget=HALF,
                example_inputs=x,
                **choice,
            )
            pruner.compress()
            plans.append(pruner.plan.widths)
            pruner.unwrap_model()
        assert plans[0] == plans[1] == plans[2]


def test_an_importance_may_declare_its_own_and_strangers_are_uniform():
    class Stranger(tp.importance.Importance):
        def __call__(self, group):
            return torch.arange(len(group[0].idxs), dtype=torch.float32) + 1

    class Declared(Stranger):
        default_allocator = "greedy"

    assert (default_allocator(Stranger()), default_allocator(Declared())) == ("uniform", "greedy")
    assert default_allocator(lambda group: None) == "uniform"


def test_the_importance_may_be_set_later():
    widths = []
    for later in (False, True):
        model, x = make_network("residual")
        importance = tp.importance.MagnitudeImportance(p=1)
        pruner = BudgetPruner(model, x, importance="random" if later else importance, budget=HALF)
        pruner.importance = importance
        widths.append(pruner.plan().widths)
    assert widths[0] == widths[1]


def test_unknown_names_are_refused_before_anything_runs():
    model, x = make_network("plain")
    with pytest.raises(ValueError, match="unknown allocator 'gredy'"):
        BudgetPruner(model, x, importance=OBSImportance(), budget=HALF, allocator="gredy")
    with pytest.raises(TypeError, match="must be one of"):
        BudgetPruner(nn.Linear(2, 2), x, importance=OBSImportance(), budget=HALF, allocator=3)


def test_criteria_of_one_kind_are_alike():
    taylor = [tp.importance.TaylorImportance(), tp.importance.GroupTaylorImportance()]
    assert {default_allocator(importance) for importance in taylor} == {"greedy"}


def test_warnings_name_the_line_of_the_caller():
    model, x = make_network("residual")
    with pytest.warns(UserWarning, match="nothing is pruned") as caught:
        prune(model, x, LOADER, budget=Budget(macs=1.0), method="l1")
    assert [w.filename for w in caught if "nothing is pruned" in str(w.message)] == [__file__]
