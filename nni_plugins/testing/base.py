"""What every test of an NNI pruner starts from."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import pytest
from torch import nn

from tp_importance import Budget
from tp_importance.testing.cases import verified

from .. import ImportancePruner
from ..config import Config
from .cases import HALF, Case, case, threads, warns_of_what_is_left_out

__all__ = ["PrunerCase"]


class PrunerCase:
    """How to make the pruner: by its class and options, or by overriding :meth:`make` and :meth:`fuse`."""

    pruner_class: type[ImportancePruner]
    """Class of the pruner."""

    options: ClassVar[dict[str, Any]] = {}
    """Its options in every test."""

    def make(
        self,
        model: nn.Module,
        config_list: Config,
        evaluator: Any = None,
        *,
        loader: Iterable[Any],
        budget: Budget | None = None,
        **options: Any,
    ) -> ImportancePruner:
        """The pruner of a model.

        Args:
            model: to be wrapped.
            config_list: NNI's.
            evaluator: NNI's, for pruning while training.
            loader: batches ``(inputs, labels)``.
            budget: in place of the ratios of the config_list.
            **options: of :class:`.ImportancePruner`, to be handed on.
        """
        options = {**self.options, **options}
        return self.pruner_class(model, config_list, evaluator, loader=loader, budget=budget, **options)

    def fuse(
        self, compressor: Any, config_list: Config, *, loader: Iterable[Any], budget: Budget | None = None
    ) -> ImportancePruner:
        """The pruner fused with another compressor of NNI; arguments as in :meth:`make`."""
        return self.pruner_class.from_compressor(compressor, config_list, loader=loader, budget=budget, **self.options)

    def pruner_of(self, name: str, config_list: Config = HALF, **options: Any) -> tuple[ImportancePruner, Case]:
        """The pruner of a copy of a network, and the case it was copied from.

        Args:
            name: key of :data:`tp_importance.testing.TOPOLOGIES`.
            config_list: NNI's.
            **options: for :meth:`make`; ``loader`` replaces the usual one.
        """
        this = case(name)
        with warns_of_what_is_left_out(name):
            options = {"loader": this.loader, **verified(name), **options}
            pruner = self.make(copy.deepcopy(this.model), config_list, **options)
        return pruner, this

    @pytest.fixture(autouse=True)
    def one_thread(self) -> Iterator[None]:
        """On networks this small a second thread only waits, for long if the cores are busy."""
        with threads(1):
            yield
