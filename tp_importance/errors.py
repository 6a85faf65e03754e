"""Exceptions a user can meet; all are ``ValueError``, ``TypeError`` or ``RuntimeError``."""

from __future__ import annotations

__all__ = ["BudgetError", "NotCollectedError", "StaleStatisticsError", "TracingError"]


class TracingError(RuntimeError):
    """The network could not be traced into a dependency graph."""


class BudgetError(ValueError):
    """The budget cannot be met; the message names the least reachable cost."""


class NotCollectedError(RuntimeError):
    """A data-driven importance was used before its statistics were collected."""


class StaleStatisticsError(RuntimeError):
    """The network changed after the statistics were collected."""
