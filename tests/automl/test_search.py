"""The search that keeps the budget, and existing optimisers on it."""

import subprocess
import sys
import textwrap
from functools import partial

import numpy as np
import pytest
import torch

from helpers.automl_cases import BATCHES, X, network
from tp_importance import Budget, BudgetError
from tp_importance.automl import (
    BudgetProblem,
    BudgetSearch,
    Int,
    Parameter,
    SearchExhaustedError,
    SearchSpace,
    optuna_objective,
    ray_trainable,
    requeue_interrupted,
)
from tp_importance.core.optional import optional_import
from tp_importance.errors import MissingPackageError, SearchSpaceError


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
    while sys.argv[2] == "later" and any(t.state.name == "WAITING" for t in study.trials):
        time.sleep(0.05)
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
    # Optuna locks nothing in SQLite: two workers that ask at once both get a queued trial, and one of them fails
    workers = [start([*command, when, "4"]) for when in ("first", "later")]
    said = [w.communicate(timeout=60)[0] for w in workers]
    assert [w.returncode for w in workers] == [0, 0], said
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
