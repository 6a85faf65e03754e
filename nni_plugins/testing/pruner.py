"""The contract of an NNI pruner."""

from __future__ import annotations

from .masking import MaskTests
from .schedules import ScheduleTests
from .untouched import UntouchedTests

__all__ = ["NNIPrunerContract"]


class NNIPrunerContract(MaskTests, UntouchedTests, ScheduleTests):
    """What a user of NNI expects of an :class:`~nni_plugins.ImportancePruner`.

    Inherit in a test file, name the class, and pytest runs every test on it:

    >>> from nni_plugins import OBSPruner
    >>> from nni_plugins.testing import NNIPrunerContract
    >>> class TestMine(NNIPrunerContract):
    ...     pruner_class = OBSPruner
    >>> TestMine().test_same_data_same_masks()

    An importance without a pruner class of its own overrides :meth:`make` (and sets what it cannot be fused with to
    ``None``):

    >>> from nni_plugins import ImportancePruner
    >>> from tp_importance import CATROImportance
    >>> class TestOther(NNIPrunerContract):
    ...     def make(self, model, config_list, evaluator=None, **options):
    ...         return ImportancePruner(model, config_list, evaluator, importance=CATROImportance(), **options)
    ...     test_fused_with_a_distiller = test_fused_and_scheduled = test_fused_with_a_quantizer = None
    >>> TestOther().test_frozen_model()

    * **Masks** (:class:`.MaskTests`): by ratio and to budgets, ``speedup`` gives a model that computes what the masked
      one did and costs what was planned; metrics and masks are of NNI's form and can be saved.
    * **Nothing else** (:class:`.UntouchedTests`): values, modes, hooks and random state are left alone, also by errors.
    * **Training** (:class:`.ScheduleTests`): under NNI's schedulers, and fused with its distiller and quantizer.

    Attributes:
        pruner_class: class of the pruner.
        options: its options in every test.
    """
