"""Exceptions a user can meet; all are ``ValueError``, ``TypeError`` or ``RuntimeError``."""

from __future__ import annotations

__all__ = [
    "BudgetError",
    "MissingPackageError",
    "NotCollectedError",
    "SearchSpaceError",
    "StaleStatisticsError",
    "TracingError",
]


class TracingError(RuntimeError):
    """The network could not be traced."""


class BudgetError(ValueError):
    """The budget cannot be met; the message names the least reachable cost."""


class MissingPackageError(ImportError, RuntimeError):
    """An optional package cannot be imported; the message names it and the extra that installs it."""


class SearchSpaceError(ValueError):
    """A search space, or the parameters of a trial, are not what pruning understands."""


class NotCollectedError(RuntimeError):
    """A data-driven importance was used before its statistics were collected."""


class StaleStatisticsError(RuntimeError):
    """The network changed after the statistics were collected."""
