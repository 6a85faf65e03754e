"""Contract of a pruner: after an error the network is bit for bit what it was, and hooks are gone."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest

from ..budget import Budget
from .cases import verified
from .data import BAD_LABELS, BAD_LOADERS, FailingLoader, LoaderError, loader_for
from .networks import make_network
from .snapshots import Snapshot, same_values
from .surgery import PrunerCase

__all__ = ["RobustnessTests"]


class RobustnessTests(PrunerCase):
    """Data that are wrong, loaders that fail and histories that do not fit are refused without a trace."""

    def assert_refused(
        self,
        loader: Callable[[Any], Any],
        errors: type[Exception],
        refit: str | None = None,
        **options: Any,
    ) -> None:
        """Pruning with a spoilt loader raises, and leaves model and pruner as they were.

        Args:
            loader: makes the spoilt loader out of a good one.
            errors: what is to be raised.
            refit: of the step.
            **options: for :meth:`make`.
        """
        model, x = make_network("plain")
        model.train()
        snapshot, built = Snapshot(model), []
        with pytest.raises(errors) as caught, warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            built.append(
                self.make(model, x, loader(loader_for(x)), Budget(macs=0.5), **{**verified("plain"), **options})
            )
            built[0].step(refit=refit)
        snapshot.check()
        for pruner in built:  # what is no loader at all is refused at once
            assert pruner.groups.widths == pruner.initial_widths and pruner.pruning_history() == []
        if not isinstance(caught.value, LoaderError):
            assert isinstance(caught.value, (ValueError, TypeError, RuntimeError)) and str(caught.value)

    @pytest.mark.parametrize("kind", BAD_LABELS)
    def test_bad_labels(self, kind: str) -> None:
        """Labels that are missing, of one class, or malformed; only for what reads labels."""
        if not self.needs_labels:
            pytest.skip("looks at no labels")
        self.assert_refused(*BAD_LABELS[kind])

    @pytest.mark.parametrize("kind", BAD_LOADERS)
    def test_bad_loaders(self, kind: str) -> None:
        """Loaders that are empty, hold no numbers, or are none."""
        spoil, error = BAD_LOADERS[kind]
        self.assert_refused(spoil, error, refit="batchnorm" if not self.uses_data else None)

    def test_the_loaders_own_exception_passes(self) -> None:
        """An exception of the user's loader arrives as it is, also after the surgery, which is undone."""
        self.assert_refused(FailingLoader, LoaderError, refit="batchnorm")
        if self.uses_data:  # the second pass is the recalibration's, behind the surgery
            self.assert_refused(lambda batches: FailingLoader(batches, 2), LoaderError, refit="batchnorm")

    def test_a_step_that_failed_can_be_repeated(self) -> None:
        """After a failure the same pruner gives what it would have given at once."""
        model, x = make_network("concat")
        loader = FailingLoader(loader_for(x), fatal=1 + self.uses_data)
        pruner = self.make(model, x, loader, Budget(macs=0.5), **verified("concat"))
        snapshot = Snapshot(model)
        with pytest.raises(LoaderError):
            pruner.step(refit="batchnorm")
        snapshot.check()
        pruner.step()
        clean, expected, _ = self.fresh("concat")
        clean.step()
        assert same_values(model, expected) and pruner.pruning_history() == clean.pruning_history()

    def test_a_history_that_does_not_fit(self) -> None:
        """A history of another network, or no history at all, is refused; the pruner works on."""
        pruner, model, _ = self.fresh("plain")
        snapshot, widths = Snapshot(model), pruner.groups.widths
        histories: list[Any] = [
            [["nope", True, [0]]],
            [["0.0", True, [99]]],
            [["0.0", True, [1]], ["1.0", True, [-3]]],
            [[3]],
            3,
        ]
        for bad in histories:
            with pytest.raises((ValueError, TypeError)):
                pruner.load_pruning_history(bad)
            snapshot.check()
        assert pruner.groups.widths == widths and pruner.pruning_history() == []
        pruner.step()
