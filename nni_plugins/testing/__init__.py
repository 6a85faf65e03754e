"""Tests that a new NNI pruner inherits, see :class:`NNIPrunerContract`.

They need pytest: ``pip install "tp-importance[testing]"``; nothing else imports this package.
"""

from tp_importance.core.optional import optional_import

# the asserts of these modules are to show their values, as those of test files do
_TESTS = ("cases", "masking", "schedules", "untouched")
optional_import("pytest").register_assert_rewrite(*(f"{__name__}.{module}" for module in _TESTS))

from .cases import (  # noqa: E402
    assert_budget_rule,
    assert_masked_is_removed,
    assert_same_masks,
    case,
    hooks,
    output,
    relative_error,
    removed_filters,
    threads,
    wrappers,
)
from .pruner import NNIPrunerContract  # noqa: E402
from .training import TrainingLog, make_evaluator, training_step  # noqa: E402

__all__ = [
    "NNIPrunerContract",
    "TrainingLog",
    "assert_budget_rule",
    "assert_masked_is_removed",
    "assert_same_masks",
    "case",
    "hooks",
    "make_evaluator",
    "output",
    "relative_error",
    "removed_filters",
    "threads",
    "training_step",
    "wrappers",
]
