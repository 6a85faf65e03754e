"""Searches for widths on scikit-learn's digits: the tuner that stays on the budget beside Random and TPE.

The residual CNN of examples/quickstart.py, 898 training images, 256 of them for calibration. The other 899 are halved:
searches see the accuracy on one half, the table shows the other. One shot, batch norms recalibrated, no training. All
arms get the same number of trials; those over ratios get the channels in CATRO's order as a gift. "raw": the ratios
are taken as they are, and a trial over the budget counts as 0 %. "scaled": they are multiplied to meet the budget.
"automl-pareto": accuracy and MACs at once.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.experiment import FOLLOWED, Experiment, Run
from benchmarks.tables import Rows, chosen, markdown
from benchmarks.tasks import Digits, quickstart
from tp_importance import Budget, BudgetError
from tp_importance.automl import BudgetProblem, SearchSpace, optuna_objective, prune_trial, search_space
from tp_importance.core.optional import optional_import

METHODS = ["catro", "itpruner", "psap", "magnitude"]
SINGLE = {"catro.class_weight": 0.5, "itpruner.beta": 0.0, "psap.ratio": 0.5, "magnitude.p": 1}
BUDGETS = (0.15, 0.3, 0.45, 0.6)
"""Single-method points of the Pareto search: default options, and these fractions of the MACs."""
TUNERS = {"PruningBudget, TPE": "tpe", "PruningBudget, CMA-ES": "cmaes"}  # the first is the default
ARMS = (
    *TUNERS,
    *(f"{host}, {how}" for how in ("raw", "scaled") for host in ("NNI Random", "NNI TPE", "Optuna TPE")),
    "Optuna TPE over weights",
)
Params = Mapping[str, Any]
Trial = Callable[[Params], dict[str, float]]


class Search:
    """One trained network, its data, and what its trials share."""

    def __init__(self, task: Digits, epochs: int) -> None:
        x, y = (torch.cat(parts) for parts in zip(*task.test, strict=True))
        self.validation, self.test = [(x[0::2], y[0::2])], [(x[1::2], y[1::2])]
        self.task, self.model, self.x = task, task.trained(epochs), task.calibration[0][0][:2]
        self.accuracy = quickstart().accuracy
        self.dense = self.accuracy(self.model, self.test)
        self.folder = Path(tempfile.mkdtemp())
        self.groups = task.groups

    def trial(self, params: Params, budget: Budget | None) -> dict[str, float]:
        """Metrics of one trial; ``test`` is not for the search."""
        tested: list[float] = []
        found = prune_trial(
            self.model,
            params,
            example_inputs=self.x,
            loader=self.task.calibration,
            evaluate=lambda model: self.accuracy(model, self.validation),
            budget=budget,
            statistics=self.folder,
            latency_seconds=None,
            keep=lambda model: tested.append(self.accuracy(model, self.test)),
            verify=False,  # the groups were verified once
        )
        return {**found, "test": tested[0]}

    def macs(self) -> float:
        """Of the whole network, as trials count them."""
        params = {f"width:{n}": w for n, w in self.groups.widths.items()}
        none = {"evaluate": lambda _: 0.0, "latency_seconds": None}
        return prune_trial(self.model, params, example_inputs=self.x, **none)["macs"]


@cache
def job(run: Run, network: str, draw: int) -> Search:
    task = run.task(network).seeded(draw)
    assert isinstance(task, Digits)
    return Search(task, run.epochs)


def limited(search: Search, params: Params, limit: float, dense: float, scaled: bool) -> dict[str, float]:
    """A trial over ratios; one over the budget is worth nothing."""
    if scaled:
        return search.trial(params, Budget(macs=limit))
    found = search.trial(params, None)
    return found if found["macs"] <= limit * dense else {**found, "default": 0.0, "test": 0.0}


def ask_and_tell(tuner: Any, trials: int, trial: Trial) -> list[dict[str, float]]:
    """Drive an NNI tuner without an experiment."""
    rows = []
    for i in range(trials):
        params = tuner.generate_parameters(i)
        rows.append(trial(params))
        tuner.receive_trial_result(i, params, rows[-1])
        tuner.trial_end(i, True)
    return rows


def nni_search(name: str, space: SearchSpace, trials: int, seed: int, trial: Trial) -> list[dict[str, float]]:
    from nni_plugins._compat import import_nni

    hpo = import_nni("nni.algorithms.hpo." + {"Random": "random_tuner", "TPE": "tpe_tuner"}[name])
    tuner = getattr(hpo, {"Random": "RandomTuner", "TPE": "TpeTuner"}[name])(
        **({"optimize_mode": "maximize"} if name == "TPE" else {}), seed=seed
    )
    tuner.update_search_space(space.to_nni())
    return ask_and_tell(tuner, trials, trial)


def optuna_search(space: SearchSpace, trials: int, seed: int, trial: Trial) -> list[dict[str, float]]:
    optuna = optional_import("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    rows: list[dict[str, float]] = []

    def logged(params: Params) -> dict[str, float]:
        rows.append(trial(params))
        return rows[-1]

    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    study.optimize(optuna_objective(space, logged), n_trials=trials)
    return rows


def tuner_search(search: Search, strategy: str, limit: float, trials: int, seed: int, trial: Trial) -> Any:
    from nni_plugins import BudgetTuner

    path, budget = search.folder / f"problem-{limit}.json", Budget(macs=limit)
    options = {"budget": budget, "methods": METHODS, "statistics": search.folder}
    problem = BudgetProblem.prepare(search.model, search.x, search.task.calibration, **options)
    problem.save(path)
    tuner = BudgetTuner(str(path), strategy=strategy, seed=seed)
    tuner.update_search_space(problem.search_space().to_nni())
    return ask_and_tell(tuner, trials, trial)


def cell(run: Run, key: dict[str, Any]) -> dict[str, Any]:
    """The best of the trials by validation accuracy."""
    arm, limit, seed = key["arm"], key["budget"], key["draw"]
    search, start = job(run, key["network"], seed), time.perf_counter()
    full = search.macs()
    per_group = "weight" if arm.endswith("weights") else "ratio"
    space = search_space(search.groups, methods=["catro"], options=False, per_group=per_group)
    trial = partial(limited, search, limit=limit, dense=full, scaled=not arm.endswith("raw"))
    if arm in TUNERS:
        rows = tuner_search(search, TUNERS[arm], limit, run.trials, seed, trial)
    elif arm.startswith("NNI"):
        rows = nni_search(arm.split()[1].rstrip(","), space, run.trials, seed, trial)
    else:
        rows = optuna_search(space, run.trials, seed, trial)
    within = sum(row["macs"] <= limit * full for row in rows)
    assert within == run.trials or arm.endswith("raw"), (arm, within)
    best = max(rows, key=lambda row: row["default"])
    return {
        "test": round(best["test"], 3),
        "validation": round(best["default"], 3),
        "within": within,
        "dense": round(search.dense, 3),
        "curve": np.maximum.accumulate([round(row["default"], 3) for row in rows]).tolist(),
        "seconds": round(time.perf_counter() - start, 1),
    }


def pareto(run: Run, key: dict[str, Any]) -> dict[str, Any]:
    """Single-method points first, then NSGA-II over method, options and budget."""
    optuna = optional_import("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    search, seed = job(run, key["network"], key["draw"]), key["draw"]
    space = search_space(methods=METHODS, budget={"macs": (0.1, 0.8)})
    sampler = optuna.samplers.NSGAIISampler(seed=seed, population_size=16)
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
    for method in METHODS:
        for fraction in BUDGETS:
            own = {k: v for k, v in SINGLE.items() if k.startswith(f"{method}.")}
            study.enqueue_trial({"method": method, **own, "budget:macs": fraction}, user_attrs={"single": True})
    objective = optuna_objective(space, lambda p: search.trial(p, None), ("default", "macs"))
    study.optimize(objective, n_trials=run.trials, catch=(BudgetError,))
    points = {
        t.number: {"single": bool(t.user_attrs.get("single")), **t.params}
        | {k: t.user_attrs[k] for k in ("default", "macs", "test")}
        for t in study.get_trials()
        if t.values
    }
    front = sorted((points[t.number] for t in study.best_trials), key=lambda p: p["macs"])
    singles = [p for p in points.values() if p["single"]]
    dominated = [p for p in front for q in singles if _dominates(q, p)]
    assert not dominated, dominated
    found = sum(not p["single"] for p in front)
    return {"front": front, "points": list(points.values()), "dominated": len(dominated), "found": found}


def _dominates(q: dict[str, Any], p: dict[str, Any]) -> bool:
    better = q["default"] > p["default"] or q["macs"] < p["macs"]
    return better and q["default"] >= p["default"] and q["macs"] <= p["macs"]


def by_arm(rows: Rows) -> str:
    """Median (least to most), and the default tuner minus the search: mean ± standard error over common draws."""
    lines, ours = [], {r["draw"]: r for r in chosen(rows, arm=ARMS[0])}
    for arm in ARMS:
        mine = chosen(rows, arm=arm)
        if not mine:
            continue
        line: list[Any] = [arm]
        for value in ("test", "validation"):
            found = [r[value] for r in mine]
            line.append(f"{np.median(found):.1f} ({min(found):.1f}–{max(found):.1f})")
        line.append(f"{np.mean([r['within'] / len(r['curve']) for r in mine]):.0%}")
        for value in ("test", "validation"):
            pairs = [ours[r["draw"]][value] - r[value] for r in mine if r["draw"] in ours]
            error = np.std(pairs, ddof=1) / len(pairs) ** 0.5 if len(pairs) > 1 else np.nan
            line.append(f"{np.mean(pairs):+.1f} ± {error:.1f}" if pairs and arm != ARMS[0] else "")
        lines.append([*line, len(mine)])
    header = ["search", "test top-1", "validation top-1", "within budget", "tuner minus it, test", "validation"]
    return markdown([*header, "repeats"], lines)


def front(rows: Rows) -> str:
    lines = [
        [
            f"{p['macs'] / 1e3:.0f}",
            p["method"],
            *(f"{p[k]:.1f}" for k in ("default", "test")),
            "yes" if p["single"] else "no",
        ]
        for row in rows
        for p in row["front"]
    ]
    return markdown(["k MACs", "method", "validation top-1", "test top-1", "single method"], lines)


EXPERIMENTS = (
    Experiment(
        "automl",
        "compare searches for widths on digits",
        {"network": ["digits"], "draw": list(range(10)), "budget": [0.3], "arm": ARMS},
        cell,
        settings={"epochs": 10, "trials": 24, "methods": METHODS, **FOLLOWED},
        show={"by-arm": by_arm},
        dense=False,
        smoke={"budget": [0.3], "arm": ["PruningBudget, TPE", "Optuna TPE, scaled"], "epochs": 1, "trials": 2},
        threads=1,
    ),
    Experiment(
        "automl-pareto",
        "accuracy and MACs at once, on digits",
        {"network": ["digits"], "draw": [0]},
        pareto,
        settings={"epochs": 10, "trials": 40, "methods": METHODS, **FOLLOWED},
        show={"front": front},
        dense=False,
        smoke={"epochs": 1, "trials": 3},
        threads=1,
    ),
)
