"""One trial, search spaces, the registry, shared statistics, and the search that keeps the budget."""

import subprocess
import sys
import textwrap
from functools import partial

import numpy as np
import pytest
import torch
import torch_pruning as tp

from helpers.states import state
from tp_importance import Budget, BudgetError, count_ops, prunable_groups
from tp_importance.automl import (
    METHODS,
    BudgetProblem,
    BudgetSearch,
    Choice,
    CurveStore,
    Float,
    Int,
    Method,
    Parameter,
    SearchExhaustedError,
    SearchSpace,
    channel_method,
    optuna_objective,
    prune_trial,
    ray_trainable,
    register_method,
    requeue_interrupted,
    search_space,
)
from tp_importance.automl import methods as registry
from tp_importance.core.optional import optional_import
from tp_importance.errors import MissingPackageError, SearchSpaceError
from tp_importance.testing import NUM_CLASSES
from tp_importance.testing.networks import plain, residual

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
BATCHES = [
    (torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(i)), torch.arange(16) % NUM_CLASSES)
    for i in range(2)
]


def network(build=residual):
    torch.manual_seed(0)
    return build().eval()


def weight_sum(model):
    return float(sum(p.detach().abs().sum() for p in model.parameters()))


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


def run(model, params, **options):
    options = {
        "budget": Budget(macs=0.5),
        "loader": BATCHES,
        "latency_seconds": None,
        "evaluate": weight_sum,
        **options,
    }
    return prune_trial(model, params, example_inputs=X, **options)


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
            "no consumers of removed channels to refit",
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

    plain, off = (run(model, {"method": name, **p}, evaluate=error) for p in ({}, {"refit": "batchnorm"}))
    found = {}
    for mode in ("parallel", "sequential"):
        found[mode] = run(model, {"method": name, "refit": mode}, evaluate=error)
        assert run(model, {"method": name}, evaluate=error, refit=mode) == found[mode]
        assert run(model, {"method": name, "refit": "batchnorm"}, evaluate=error, refit=mode) == plain == off
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


def test_registry_refuses_duplicates_and_takes_new_methods(monkeypatch):
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    monkeypatch.setattr(registry, "METHODS", registry._METHODS)
    with pytest.raises(ValueError, match="registered already"):
        register_method(METHODS["catro"])
    with pytest.raises(ValueError, match="cannot be the name"):
        register_method(Method("a.b", print))
    with pytest.raises(TypeError):
        METHODS["x"] = METHODS["catro"]  # type: ignore[index]
    register_method(channel_method("lamp", tp.importance.LAMPImportance, {"p": Choice((1, 2))}))
    model = network()
    assert run(model, {"method": "lamp", "lamp.p": 1})["macs"] <= 0.5 * count_ops(model, X)[0]
    assert [p.name for p in search_space(methods=["lamp"]).parameters] == ["method", "lamp.p"]


def test_space_in_every_form():
    groups = prunable_groups(network(), X)
    space = search_space(groups, methods=["catro", "fpgm"], per_group="ratio", budget={"macs": (0.2, 0.8)})
    assert SearchSpace.from_dict(space.to_dict()) == space
    nni = space.to_nni()
    assert nni["method"]["_value"][0] == {
        "_name": "catro",
        "catro.class_weight": {"_type": "uniform", "_value": [0.0, 1.0]},
    }
    assert set(nni) == {"method", "budget:macs", *(f"ratio:{n}" for n in groups.names)}
    plain = {"budget:macs": 0.5, **{f"ratio:{n}": 0.1 for n in groups.names}}
    nested = {"method": {"_name": "catro", "catro.class_weight": 0.5}, **plain}
    assert space.check(nested) == {"method": "catro", "catro.class_weight": 0.5, **plain}
    assert "catro.class_weight" not in space.check({"method": "fpgm", "catro.class_weight": 0.5, **plain})
    for bad in ({**plain}, {**nested, "more": 1}, {**nested, "budget:macs": 0.9}):
        with pytest.raises(SearchSpaceError):
            space.check(bad)
    assert SearchSpace((Parameter("n", Int(1, 4)),)).to_nni() == {"n": {"_type": "randint", "_value": [1, 5]}}


@pytest.mark.parametrize(
    "make",
    [
        lambda: Float(2, 1),
        lambda: Float(0, 1, log=True),
        lambda: Int(1, 2.5),
        lambda: Choice(()),
        lambda: SearchSpace((Parameter("a", Int(1, 2)), Parameter("a", Int(1, 2)))),
        lambda: SearchSpace((Parameter("catro.x", Int(1, 2), "catro"),)),
        lambda: search_space(methods="catro"),
        lambda: search_space(methods=["resconv"], per_group="ratio"),
        lambda: search_space(per_group="ratio"),
        lambda: search_space(budget={"macs": (0.5, 2.0)}),
        lambda: search_space(allocators=["gready"]),
        lambda: search_space(refit=["serial"]),
        lambda: search_space(methods=["resconv"], refit=["batchnorm", "parallel"]),
        lambda: SearchSpace.from_dict({"a": {"kind": "real"}}),
    ],
)
def test_wrong_spaces_are_refused(make):
    with pytest.raises(SearchSpaceError):
        make()


def test_statistics_are_collected_once(tmp_path):
    model = network()
    passes = []

    class Loader:
        def __iter__(self):
            passes.append(1)
            return iter(BATCHES)

    for space in ("consumer", "channel"):
        first = run(model, {"method": "catro", "catro.space": space}, statistics=tmp_path, loader=Loader(), refit=None)
        assert len(passes) == 1
        again = run(model, {"method": "catro", "catro.space": space}, statistics=tmp_path, loader=Loader(), refit=None)
        fresh = run(model, {"method": "catro", "catro.space": space}, refit=None)
        assert first == again == fresh and len(passes) == 1
        passes.clear()
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    run(model, {"method": "catro"}, statistics=tmp_path, loader=Loader(), refit=None)
    assert len(passes) == 1  # other weights, other statistics
    path = CurveStore(tmp_path, model).path("x", {})
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="delete it"):
        CurveStore(tmp_path, model).get("x", {}, lambda: pytest.fail("collected"))


def test_groups_are_verified_once(tmp_path, monkeypatch):
    verdicts = []

    def verify(groups, example_inputs):
        verdicts.append({groups.names[0]: "a test says so"})
        return verdicts[-1]

    monkeypatch.setattr("tp_importance.automl.statistics.verify_groups", verify)
    model, kept = network(), []
    first = prunable_groups(model, X, verify=False).names[0]
    for _ in range(2):
        run(model, {"method": "magnitude"}, statistics=tmp_path, keep=kept.append)
        assert len(verdicts) == 1 and kept[-1].get_submodule(first).out_channels == 8
    run(model, {"method": "magnitude"}, statistics=tmp_path, verify=False, keep=kept.append)
    assert len(verdicts) == 1 and kept[-1].get_submodule(first).out_channels < 8
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    run(model, {"method": "magnitude"}, statistics=tmp_path)
    assert len(verdicts) == 2
    for path in tmp_path.glob("verified-*.json"):
        path.write_text("nonsense")
    with pytest.raises(ValueError, match="delete it"):
        run(model, {"method": "magnitude"}, statistics=tmp_path)


@pytest.fixture
def problem(tmp_path):
    names = ["catro", "itpruner", "magnitude"]
    return BudgetProblem.prepare(network(), X, BATCHES, budget=Budget(macs=0.5), methods=names, statistics=tmp_path)


def test_weights_are_coordinates_of_the_budget(problem, tmp_path):
    for method, units in problem.starts.items():
        assert np.abs(problem.project(problem.weights(units), method) - units).max() <= 1
    random = np.random.default_rng(0)
    for _ in range(50):
        assert problem.fits(problem.project(np.exp(3 * random.normal(size=len(problem.cost.names))), "catro"))
    problem.save(tmp_path / "p.json")
    again = BudgetProblem.load(tmp_path / "p.json")
    weights = np.arange(1.0, 1 + len(problem.cost.names))
    assert (again.project(weights, "catro") == problem.project(weights, "catro")).all()
    (tmp_path / "q.json").write_text("{}")
    with pytest.raises(ValueError, match="no search problem"):
        BudgetProblem.load(tmp_path / "q.json")


def test_unreachable_budgets_are_refused():
    with pytest.raises(BudgetError, match="Give at least"):
        BudgetProblem.prepare(network(), X, budget=Budget(macs=0.001), methods=["magnitude"])


@pytest.mark.parametrize("strategy", ["tpe", "cmaes"])
def test_search_keeps_the_budget_never_repeats_and_improves(problem, strategy):
    goal = problem.project(np.linspace(0.2, 5, len(problem.cost.names)), "catro")

    def value(params):
        return -float(np.abs(problem.units(params) - goal).sum()) + 1000 * (params["method"] == "catro")

    search, seen = BudgetSearch(problem, strategy=strategy, seed=1), set()
    waiting = []
    for i in range(40):
        waiting.append(search.ask())
        units = problem.units(waiting[-1])
        assert problem.fits(units)
        key = (waiting[-1]["method"], tuple(units))
        assert key not in seen
        seen.add(key)
        if i % 2:  # two at a time, as with concurrency 2; some fail
            for k, params in enumerate(waiting):
                search.tell(params, None if i % 14 == 1 and k else value(params))
            waiting.clear()
    starts = max(v for _, v in search.history[:3] if v is not None)
    assert search.best[1] > starts
    assert search.best[0]["method"] == "catro"


def test_search_resumes_from_told_results(problem):
    first = BudgetSearch(problem)
    for i in range(8):
        first.tell(first.ask(), float(i))
    second = BudgetSearch(problem)
    for params, v in first.history:
        second.tell(params, v)
    told = [problem.units(p).tolist() for p, _ in first.history]
    proposal = second.ask()
    assert problem.units(proposal).tolist() not in told or proposal["method"] != first.history[0][0]["method"]
    assert second.best == first.best
    with pytest.raises(SearchSpaceError):
        second.tell({"method": "catro", "width:x": 3}, 1.0)
    with pytest.raises(SearchSpaceError, match="whole number"):
        second.tell({**proposal, "width:0.0": 3.5}, 1.0)
    with pytest.raises(ValueError, match="finite"):
        second.tell(proposal, float("nan"))


def test_search_leaves_out_what_runs_elsewhere(problem):
    first, second = BudgetSearch(problem), BudgetSearch(problem)
    proposals = [first.ask() for _ in range(4)]
    for params in proposals[:3]:
        second.expect(params)
    assert second.ask() == proposals[3]
    second.tell(proposals[0], 1.0)  # and what it gave comes later
    assert second.best == (proposals[0], 1.0)


@pytest.mark.parametrize("strategy", ["tpe", "cmaes"])
def test_search_of_one_group_ends(strategy):
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 2, 3))
    problem = BudgetProblem.prepare(net, X, budget=Budget(macs=0.5), methods=["magnitude"])
    search = BudgetSearch(problem, strategy=strategy)
    search.tell(search.ask(), 1.0)
    with pytest.raises(SearchExhaustedError):
        search.ask()


@pytest.mark.parametrize("options", [{"sigma": 0}, {"population": 1}, {"seed": -1}, {"strategy": "bayes"}])
def test_search_checks_its_options(problem, options):
    with pytest.raises(ValueError):
        BudgetSearch(problem, **options)


def test_missing_packages_name_the_extra(monkeypatch, problem):
    for name in ("cmaes", "optuna", "optuna.trial", "ray.tune"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(MissingPackageError, match=r"tp-importance\[automl\]"):
            optional_import(name)
    for strategy, package in (("cmaes", "cmaes"), ("tpe", "optuna")):
        with pytest.raises(MissingPackageError, match=package):
            BudgetSearch(problem, strategy=strategy)
    with pytest.raises(MissingPackageError, match="ray"):
        SearchSpace((Parameter("a", Int(1, 2)),)).to_ray()


def failing(params):
    if params["n"] == 3:
        raise RuntimeError("no luck")
    return {"default": params["n"], "macs": 10.0 * params["n"]}


SPACE = SearchSpace((Parameter("n", Int(1, 4)),))


def test_optuna_reports_failures_and_goes_on():
    optuna = optional_import("optuna")
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(optuna_objective(SPACE, failing, ("default", "macs")), n_trials=12, catch=(Exception,))
    failed = [t for t in study.trials if t.state.name == "FAIL"]
    assert len(study.trials) == 12 and failed
    assert all(t.params == {"n": 3} and t.user_attrs["error"] == "RuntimeError: no luck" for t in failed)
    assert {t.params["n"] for t in study.best_trials} == {t.params["n"] for t in study.trials} - {3}
    with pytest.raises(ValueError, match="latency"):
        optuna_objective(SPACE, failing, ("latency",))(optuna.trial.FixedTrial({"n": 1}))


WORKER = """
    import os, sys, time, optuna
    from tp_importance.automl import Int, Parameter, SearchSpace, optuna_objective
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.load_study(study_name="s", storage=sys.argv[1])
    def run(params):
        if sys.argv[2] == "die" and len(study.trials) > 3:
            os._exit(1)
        time.sleep(0.05)
        return {"default": params["n"]}
    study.optimize(optuna_objective(SearchSpace((Parameter("n", Int(1, 99)),)), run), n_trials=int(sys.argv[3]))
"""


def test_killed_and_resumed_with_two_workers(tmp_path):
    optuna = optional_import("optuna")
    storage = f"sqlite:///{tmp_path}/s.db"
    study = optuna.create_study(study_name="s", storage=storage, direction="maximize")
    start = partial(subprocess.Popen, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(WORKER), storage]
    assert start([*command, "die", "10"]).wait(60) == 1
    done = [t.number for t in study.trials if t.state.name == "COMPLETE"]
    lost = [t for t in study.trials if t.state.name == "RUNNING"]
    assert len(done) == 3 and len(lost) == 1
    assert requeue_interrupted(study) == 1
    workers = [start([*command, "live", "4"]) for _ in range(2)]
    assert [w.wait(60) for w in workers] == [0, 0]
    complete = [t for t in study.trials if t.state.name == "COMPLETE"]
    assert len(complete) == 11
    assert lost[0].params in [t.params for t in complete]


def test_ray_trainable_checks_and_reports(monkeypatch):
    trainable = ray_trainable(SPACE, failing)
    assert trainable({"n": 2}) == {"default": 2.0, "macs": 20.0}
    with pytest.raises(SearchSpaceError):
        trainable({"n": 9})
    with pytest.raises(RuntimeError, match="no luck") as caught:
        trainable({"n": 3})
    assert caught.value.__notes__ == ["parameters of the trial: {'n': 3}"]

    class Tune:  # tests/automl/test_ray.py has the real one, where it is installed
        choice, uniform, randint = (
            staticmethod(lambda *a, kind=k: (kind, *a)) for k in ("choice", "uniform", "randint")
        )

    monkeypatch.setitem(sys.modules, "ray.tune", Tune)
    monkeypatch.setattr("tp_importance.automl.space.optional_import", lambda name: Tune)
    assert SPACE.to_ray() == {"n": ("randint", 1, 5)}
