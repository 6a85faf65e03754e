"""An NNI tuner that stays on the budget, and its registration."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tp_importance.automl import BudgetProblem, BudgetSearch, SearchExhaustedError, flatten
from tp_importance.core.files import read_json, write_json
from tp_importance.errors import SearchSpaceError

from .._compat import import_nni
from .patches import report_resumed_trials, report_tuner_errors

__all__ = ["BudgetTuner", "BudgetTunerValidator", "register_tuner", "registered_tuner", "unregister_tuner"]

CHECKPOINT = "pruning_budget.json"

NAME = "PruningBudget"
"""How experiments call the tuner once it is registered: ``config.tuner.name = "PruningBudget"``."""

_nni: Any = import_nni()

_Tuner: Any = import_nni("nni.tuner").Tuner

_scalar: Any = import_nni("nni.utils").extract_scalar_reward


class BudgetTuner(_Tuner):
    """Tuner whose proposals are widths that keep the budget, see :class:`~tp_importance.automl.BudgetSearch`.

    When an experiment is resumed, NNI hands over the results there are. The trials that failed come from a file in the
    experiment's folder; those that run again are not proposed meanwhile.

    Args:
        problem: JSON file that :meth:`tp_importance.automl.BudgetProblem.save` wrote.
        strategy: see :class:`~tp_importance.automl.BudgetSearch`.
        optimize_mode: ``"maximize"`` or ``"minimize"`` the trials' ``default``.
        sigma: see :class:`~tp_importance.automl.BudgetSearch`.
        population: see :class:`~tp_importance.automl.BudgetSearch`.
        seed: see :class:`~tp_importance.automl.BudgetSearch`.

    Raises:
        MissingPackageError: without the package of the strategy, Optuna or ``cmaes``; names the extra.
        ValueError: for bad arguments or a file that is no search problem.
    """

    def __init__(
        self,
        problem: str,
        optimize_mode: str = "maximize",
        strategy: str = "tpe",
        sigma: float = 0.5,
        population: int | None = None,
        seed: int = 0,
    ) -> None:
        if optimize_mode not in ("maximize", "minimize"):
            raise ValueError(f"optimize_mode={optimize_mode!r} is unknown; choose 'maximize' or 'minimize'")
        super().__init__()
        if os.environ.get("SDK_PROCESS") == "dispatcher":
            report_tuner_errors()
        self.search = BudgetSearch(
            BudgetProblem.load(problem), strategy=strategy, sigma=sigma, population=population, seed=seed
        )
        self._sign = 1.0 if optimize_mode == "maximize" else -1.0
        self._running: dict[int, dict[str, Any]] = {}
        self._lock = threading.RLock()  # NNI reports the end of trials from another thread
        self.next_parameter_id = 0

    def update_search_space(self, search_space: dict[str, Any]) -> None:
        """Check that the experiment's search space is that of the problem; the proposals come from the problem.

        Raises:
            SearchSpaceError: if it is another one; says what differs and where the right one comes from.
        """
        ours = self.search.problem.search_space().to_nni()
        if search_space == ours:
            return
        keys = [*ours, *search_space] if isinstance(search_space, dict) else list(ours)
        given = search_space if isinstance(search_space, dict) else {}
        odd = {key: (given.get(key), ours.get(key)) for key in keys if given.get(key) != ours.get(key)}
        key, (found, wanted) = next(iter(odd.items()))
        raise SearchSpaceError(
            f"the search space is not that of the tuner's problem: {key} is {found}, not {wanted} "
            f"({len(odd)} differences in all); set config.search_space = problem.search_space().to_nni()"
        )

    def generate_parameters(self, parameter_id: int, **kwargs: Any) -> dict[str, Any]:
        """Widths that keep the budget and were not tried yet.

        Raises:
            nni.NoMoreTrialError: if there are none.
        """
        with self._lock:
            try:
                self._running[parameter_id] = self.search.ask()
            except SearchExhaustedError as error:
                raise _nni.NoMoreTrialError(str(error)) from error
            self.next_parameter_id = max(self.next_parameter_id, parameter_id + 1)
            self.save_checkpoint()
            return self._running[parameter_id]

    def receive_trial_result(self, parameter_id: int, parameters: dict[str, Any], value: Any, **kwargs: Any) -> None:
        """Learn from a trial."""
        with self._lock:
            self._running.pop(parameter_id, None)
            self.search.tell(parameters, self._goodness(value))

    def trial_end(self, parameter_id: int, success: bool, **kwargs: Any) -> None:
        """Learn from a trial that failed; the result of one that succeeded may be still on its way."""
        with self._lock:
            left = self._running.pop(parameter_id, None)
            if left is not None and not success:
                self.search.tell(left, None)
                self.save_checkpoint()

    def import_data(self, data: list[Any]) -> None:
        """Take over the results of earlier trials, as NNI does when an experiment is resumed."""
        with self._lock:
            for entry in data:
                self.search.tell(flatten(entry["parameter"]), self._goodness(entry["value"]))

    def resume_trials(self, running: Mapping[int, dict[str, Any]]) -> None:
        """Trials of an earlier run that NNI runs again, by the number of their parameters."""
        with self._lock:
            for parameter_id, parameters in running.items():
                self.search.expect(parameters)
                self._running[parameter_id] = flatten(parameters)

    def _goodness(self, value: Any) -> float | None:
        """What the search maximises; a trial that reports no finite number has failed."""
        found = self._sign * _scalar(value)
        return found if math.isfinite(found) else None

    def save_checkpoint(self) -> None:
        """Write what NNI does not hand over when an experiment is resumed."""
        if (folder := self.get_checkpoint_path()) is not None:  # None outside an experiment
            failed = [params for params, value in self.search.history if value is None]
            content = {"next_parameter_id": self.next_parameter_id, "failed": failed}
            write_json(Path(folder, CHECKPOINT), content)

    def load_checkpoint(self) -> None:
        """Read it; NNI calls this in a resumed experiment, before anything else.

        Raises:
            ValueError: if the file is damaged; names it.
        """
        report_resumed_trials(self)
        path = Path(self.get_checkpoint_path() or "", CHECKPOINT)
        if path.is_file():  # else it was stopped before the first trial
            try:
                content = read_json(path)
                self.next_parameter_id = int(content["next_parameter_id"])
                for parameters in content["failed"]:
                    self.search.tell(parameters, None)
            except (LookupError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{path} cannot be read ({type(error).__name__}: {error}); delete it to resume without the trials "
                    "that failed, which may then be proposed again"
                ) from error


class BudgetTunerValidator(_nni.ClassArgsValidator):
    """Checks the arguments of :class:`BudgetTuner` before an experiment starts."""

    def validate_class_args(self, **kwargs: Any) -> None:
        """Build the tuner once, without an experiment.

        Raises:
            ValueError: for an argument that is missing, unknown or not allowed.
        """
        try:
            BudgetTuner(**kwargs)
        except TypeError as error:
            raise ValueError(
                f"class_args of {NAME}: {error}; it takes problem, optimize_mode, strategy, sigma, population, seed"
            ) from error


def register_tuner(name: str = NAME) -> None:
    """Make the tuner known to NNI under a name; the same as ``nnictl algo register --meta`` with ``algorithms.yml``.

    NNI keeps the registration in ``$NNI_CONFIG_DIR`` or in the environment's own folder, until
    :func:`unregister_tuner`.

    Args:
        name: how experiments call it.

    Raises:
        ValueError: if NNI itself has an algorithm of that name.
    """
    utils = import_nni("nni.tools.package_utils")
    old = utils.get_algo_meta(name)
    if old is not None and old.is_builtin:
        raise ValueError(f"NNI has an algorithm called {name!r}; choose another name")
    meta = {
        "algoType": "tuner",
        "builtinName": name,
        "className": f"{BudgetTuner.__module__}.{BudgetTuner.__qualname__}",
        "classArgsValidator": f"{BudgetTunerValidator.__module__}.{BudgetTunerValidator.__qualname__}",
        "nniVersion": _nni.__version__,
    }
    utils.register_algo_meta(utils.AlgoMeta.load(meta))


def unregister_tuner(name: str = NAME) -> None:
    """Undo :func:`register_tuner`; nothing happens if there is no such name."""
    import_nni("nni.tools.package_utils").unregister_algo_meta(name)


@contextmanager
def registered_tuner(name: str = NAME) -> Iterator[str]:
    """Register the tuner for a while, and leave the registry as it was.

    Args:
        name: how experiments call it.

    Yields:
        The name.
    """
    utils = import_nni("nni.tools.package_utils")
    old = utils.get_algo_meta(name)
    register_tuner(name)
    try:
        yield name
    finally:
        unregister_tuner(name)
        if old is not None:
            utils.register_algo_meta(old)
