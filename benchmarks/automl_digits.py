"""Searches for widths on scikit-learn's digits: the tuner that stays on the budget beside Random and TPE.

The residual CNN of examples/quickstart.py, 898 training images, 256 of them for calibration. The other 899 are halved:
searches see the accuracy on one half, the table shows the other. One shot, batch norms recalibrated, no training. All
arms get the same number of trials; those over ratios get the channels in CATRO's order as a gift. "raw": the ratios
are taken as they are, and a trial over the budget counts as 0 %. "scaled": they are multiplied to meet the budget.
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
from common import FOLLOWED, ROOT, Cells, environment, flat, load_module, markdown, parser, read_results
from torch import nn

from nni_plugins import BudgetTuner
from nni_plugins._compat import import_nni
from tp_importance import Budget, BudgetError, prunable_groups
from tp_importance.automl import (
    BudgetProblem,
    SearchSpace,
    optuna_objective,
    prune_trial,
    search_space,
)
from tp_importance.core.optional import optional_import

quickstart = load_module(ROOT / "examples" / "quickstart.py")
METHODS = ["catro", "itpruner", "psap", "magnitude"]
EPOCHS = 10
Params = Mapping[str, Any]


class Task:
    """One trained network, its data, and what its trials share."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.training, self.calibration, test = quickstart.digits(seed)
        x, y = (torch.cat(parts) for parts in zip(*test, strict=True))
        self.validation, self.test = [(x[0::2], y[0::2])], [(x[1::2], y[1::2])]
        self.x = self.calibration[0][0][:2]
        self.model: nn.Module = quickstart.build()
        quickstart.train(self.model, self.training, EPOCHS, 0.05, seed)
        self.dense = quickstart.accuracy(self.model, self.test)
        self.folder = Path(tempfile.mkdtemp())
        self.groups = prunable_groups(self.model, self.x)

    def trial(self, params: Params, budget: Budget | None) -> dict[str, float]:
        """Metrics of one trial; ``test`` is not for the search."""
        tested: list[float] = []
        found = prune_trial(
            self.model,
            params,
            example_inputs=self.x,
            loader=self.calibration,
            evaluate=lambda model: quickstart.accuracy(model, self.validation),
            budget=budget,
            statistics=self.folder,
            latency_seconds=None,
            keep=lambda model: tested.append(quickstart.accuracy(model, self.test)),
            verify=False,  # the groups were verified once, above
        )
        return {**found, "test": tested[0]}


@cache
def task(seed: int) -> Task:
    return Task(seed)


def limited(job: Task, params: Params, limit: float, dense: float, scaled: bool) -> dict[str, float]:
    """A trial over ratios; one over the budget is worth nothing."""
    if scaled:
        return job.trial(params, Budget(macs=limit))
    found = job.trial(params, None)
    return found if found["macs"] <= limit * dense else {**found, "default": 0.0, "test": 0.0}


Run = Callable[[Params], dict[str, float]]


def ask_and_tell(tuner: Any, trials: int, run: Run) -> list[dict[str, float]]:
    """Drive an NNI tuner without an experiment."""
    rows = []
    for i in range(trials):
        params = tuner.generate_parameters(i)
        rows.append(run(params))
        tuner.receive_trial_result(i, params, rows[-1])
        tuner.trial_end(i, True)
    return rows


def nni_search(name: str, space: SearchSpace, trials: int, seed: int, run: Run) -> list[dict[str, float]]:
    hpo = import_nni("nni.algorithms.hpo." + {"Random": "random_tuner", "TPE": "tpe_tuner"}[name])
    tuner = getattr(hpo, {"Random": "RandomTuner", "TPE": "TpeTuner"}[name])(
        **({"optimize_mode": "maximize"} if name == "TPE" else {}), seed=seed
    )
    tuner.update_search_space(space.to_nni())
    return ask_and_tell(tuner, trials, run)


def optuna_search(space: SearchSpace, trials: int, seed: int, run: Run) -> list[dict[str, float]]:
    optuna = optional_import("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    rows: list[dict[str, float]] = []

    def logged(params: Params) -> dict[str, float]:
        rows.append(run(params))
        return rows[-1]

    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    study.optimize(optuna_objective(space, logged), n_trials=trials)
    return rows


def tuner_search(job: Task, strategy: str, limit: float, trials: int, seed: int, run: Run) -> list[dict[str, float]]:
    path = job.folder / f"problem-{limit}.json"
    problem = BudgetProblem.prepare(
        job.model, job.x, job.calibration, budget=Budget(macs=limit), methods=METHODS, statistics=job.folder
    )
    problem.save(path)
    tuner = BudgetTuner(str(path), strategy=strategy, seed=seed)
    tuner.update_search_space(problem.search_space().to_nni())
    return ask_and_tell(tuner, trials, run)


TUNERS = {"PruningBudget, TPE": "tpe", "PruningBudget, CMA-ES": "cmaes"}  # the first is the default
ARMS = (
    *TUNERS,
    "NNI Random, raw",
    "NNI TPE, raw",
    "Optuna TPE, raw",
    "NNI Random, scaled",
    "NNI TPE, scaled",
    "Optuna TPE, scaled",
    "Optuna TPE over weights",
)


def search(arm: str, limit: float, trials: int, seed: int) -> dict[str, Any]:
    """One cell: the best of ``trials`` by validation accuracy."""
    job, start = task(seed), time.perf_counter()
    full = prune_trial(
        job.model,
        {f"width:{n}": w for n, w in job.groups.widths.items()},
        example_inputs=job.x,
        evaluate=lambda _: 0.0,
        latency_seconds=None,
    )["macs"]
    per_group = "weight" if arm.endswith("weights") else "ratio"
    space = search_space(job.groups, methods=["catro"], options=False, per_group=per_group)
    run = partial(limited, job, limit=limit, dense=full, scaled=not arm.endswith("raw"))
    if arm in TUNERS:
        rows = tuner_search(job, TUNERS[arm], limit, trials, seed, run)
    elif arm.startswith("NNI"):
        rows = nni_search(arm.split()[1].rstrip(","), space, trials, seed, run)
    else:
        rows = optuna_search(space, trials, seed, run)
    within = sum(row["macs"] <= limit * full for row in rows)
    assert within == trials or arm.endswith("raw"), (arm, within)
    best = max(rows, key=lambda row: row["default"])
    return {
        "test": round(best["test"], 3),
        "validation": round(best["default"], 3),
        "within": within,
        "dense": round(job.dense, 3),
        "curve": np.maximum.accumulate([round(row["default"], 3) for row in rows]).tolist(),
        "seconds": round(time.perf_counter() - start, 1),
    }


def pareto(trials: int, seed: int, budgets: list[float]) -> dict[str, Any]:
    """Accuracy and MACs at once: single-method points first, then NSGA-II over method, options and budget."""
    optuna = optional_import("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    job = task(seed)
    space = search_space(methods=METHODS, budget={"macs": (0.1, 0.8)})
    sampler = optuna.samplers.NSGAIISampler(seed=seed, population_size=16)
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
    defaults = {"catro.class_weight": 0.5, "itpruner.beta": 0.0, "psap.ratio": 0.5, "magnitude.p": 1}
    for method in METHODS:
        for fraction in budgets:
            own = {k: v for k, v in defaults.items() if k.startswith(f"{method}.")}
            study.enqueue_trial({"method": method, **own, "budget:macs": fraction}, user_attrs={"single": True})
    objective = optuna_objective(space, lambda p: job.trial(p, None), ("default", "macs"))
    study.optimize(objective, n_trials=trials, catch=(BudgetError,))
    points = [
        {
            "single": bool(t.user_attrs.get("single")),
            **t.params,
            **{k: t.user_attrs[k] for k in ("default", "macs", "test")},
        }
        for t in study.get_trials()
        if t.values
    ]
    best = [t.number for t in study.best_trials]
    front = [points[i] for i in sorted(best, key=lambda i: points[i]["macs"])]
    dominated = [
        p
        for p in front
        for q in points
        if q["single"]
        and q["default"] >= p["default"]
        and q["macs"] <= p["macs"]
        and (q["default"] > p["default"] or q["macs"] < p["macs"])
    ]
    assert not dominated, dominated
    return {"front": front, "points": points, "dominated": len(dominated), "found": sum(not p["single"] for p in front)}


def plot(cell: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="tight")
    axes = figure.add_subplot()
    for single, label in ((True, "methods alone"), (False, "search")):
        mine = [p for p in cell["points"] if p["single"] is single]
        axes.scatter([p["macs"] for p in mine], [p["default"] for p in mine], label=label, s=18)
    axes.step([p["macs"] for p in cell["front"]], [p["default"] for p in cell["front"]], where="post", label="Pareto")
    axes.set_xlabel("MACs")
    axes.set_ylabel("validation accuracy on digits, %")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def table(results: dict[str, Any]) -> str:
    cells = [flat(cell) for cell in results["cells"] if cell["key"]["part"] == "budget"]
    rows = []
    ours = {c["seed"]: c for c in cells if c["arm"] == ARMS[0]}
    for arm in ARMS:
        mine = [c for c in cells if c["arm"] == arm]
        if mine:
            row: list[Any] = [arm]
            for key in ("test", "validation"):
                values = [c[key] for c in mine]
                row.append(f"{np.median(values):.1f} ({min(values):.1f}–{max(values):.1f})")
            row.append(f"{np.mean([c['within'] / len(c['curve']) for c in mine]):.0%}")
            for key in ("test", "validation"):
                pairs = [ours[c["seed"]][key] - c[key] for c in mine if c["seed"] in ours]
                error = np.std(pairs, ddof=1) / len(pairs) ** 0.5 if len(pairs) > 1 else np.nan
                row.append(f"{np.mean(pairs):+.1f} ± {error:.1f}" if pairs and arm != ARMS[0] else "")
            rows.append([*row, len(mine)])
    header = [
        "search",
        "test top-1",
        "validation top-1",
        "within budget",
        "tuner minus it, test",
        "validation",
        "repeats",
    ]
    text = markdown(header, rows)
    for cell in results["cells"]:
        if cell["key"]["part"] == "pareto":
            front = [
                [
                    f"{p['macs'] / 1e3:.0f}",
                    p["method"],
                    f"{p['default']:.1f}",
                    f"{p['test']:.1f}",
                    "yes" if p["single"] else "no",
                ]
                for p in cell["front"]
            ]
            text += "\n\n" + markdown(["k MACs", "method", "validation top-1", "test top-1", "single method"], front)
    return text


def main() -> None:
    p = parser(__doc__, "automl_digits.json")
    p.set_defaults(threads=1)
    p.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    p.add_argument("--macs", type=float, default=0.3, help="fraction of the MACs that is kept")
    p.add_argument("--trials", type=int, default=24)
    p.add_argument("--seeds", type=int, nargs="+", default=list(range(10)), help="of split, network and search")
    p.add_argument("--pareto-trials", type=int, default=40)
    p.add_argument("--plot", type=Path, default=ROOT / "outputs" / "automl_pareto.png")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    if not args.table:
        settings = {"epochs": EPOCHS, "macs": args.macs, "trials": args.trials, "methods": METHODS}
        cells = Cells(args.out, settings | FOLLOWED, environment("cpu", args.date))
        for seed in args.seeds:
            for arm in args.arms:
                cells.fill(
                    {"part": "budget", "arm": arm, "seed": seed}, partial(search, arm, args.macs, args.trials, seed)
                )
            if seed == args.seeds[0]:
                budgets = [0.15, 0.3, 0.45, 0.6]
                cells.fill({"part": "pareto", "seed": seed}, partial(pareto, args.pareto_trials, seed, budgets))
    results = read_results(args.out)
    print(table(results))
    for cell in results["cells"]:
        if cell["key"]["part"] == "pareto":
            plot(cell, args.plot)


if __name__ == "__main__":
    main()
