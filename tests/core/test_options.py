"""Options that are handed on: one signature, one documentation, one error."""

import inspect

import pytest

import tp_importance as tpi
from tp_importance.core.options import described_options, hand_on, parameters_of, split_options
from tp_importance.pruning.pruner import MethodPruner
from tp_importance.pruning.target import PruningTarget

SHELLS = [tpi.CATROPruner, tpi.OBSPruner, tpi.ITPruner]


def inner(x, *, size=3, colour="red"):
    """Inner.

    Args:
        x: what.
        size: how large,
            in all.
        colour: which.

    Returns:
        Nothing.
    """


def outer(x, **options):
    """Outer.

    Args:
        x: it.
        **options: see inner,
            or somebody else.

    Raises:
        ValueError: never.
    """


def test_signature_and_text():
    target = hand_on(outer, inner, leave=("colour",))
    assert str(inspect.signature(target)) == "(x, *, size=3)"
    assert target.__doc__.splitlines() == [
        "Outer.",
        "",
        "Args:",
        "    x: it.",
        "    size: how large,",
        "        in all.",
        "",
        "Raises:",
        "    ValueError: never.",
    ]


def test_every_option_goes_to_the_first_who_takes_it():
    second = lambda *, size, weight: None  # noqa: E731
    assert split_options(outer, {"size": 1, "weight": 2}, inner, second) == ({"size": 1}, {"weight": 2})
    with pytest.raises(TypeError, match=r"outer takes no option 'colr'; did you mean 'colour'\?"):
        split_options(outer, {"colr": 1}, inner)
    with pytest.raises(TypeError, match=r"outer takes no option 'q'; see help\(outer\)"):
        split_options(outer, {"q": 1}, inner)
    with pytest.raises(TypeError, match="takes no option 'weight'"):
        split_options(outer, {"weight": 1}, inner, second, leave=("weight",))


@pytest.mark.parametrize("shell", SHELLS)
def test_shells_have_the_options_of_importance_target_and_search_for_groups(shell):
    names, texts = parameters_of(shell), described_options(shell)
    importance = set(parameters_of(shell.importance_class))
    target = set(parameters_of(PruningTarget))
    assert {"ignored_layers", "verify", "round_to", "latency_table"} <= target <= set(names)
    assert importance <= set(names) and {"allocator", "label_fn", "budget"} <= set(names)
    assert not [name for name in names if not texts.get(name)]  # each is documented
    assert list(names)[:3] == ["model", "example_inputs", "loader"]
    assert ("importance" in names) is ("importance" in importance)


def test_functions_and_whole_pruners_too():
    for target in (tpi.prune, tpi.BudgetPruner, tpi.PSAPPruner):
        names, texts = parameters_of(target), described_options(target)
        assert {"ignored_layers", "num_heads", "max_pruning_ratio"} <= set(names)
        assert not [name for name in names if not texts.get(name)]
    assert "latency_table" not in parameters_of(tpi.PSAPPruner) and "importance" not in parameters_of(tpi.prune)


def test_pruners_of_nni_too():
    nni_plugins = pytest.importorskip("nni_plugins")
    for shell in (
        nni_plugins.CATROPruner,
        nni_plugins.OBSPruner,
        nni_plugins.ITPruner,
        nni_plugins.ImportancePruner,
        nni_plugins.PSAPPruner,
    ):
        names, texts = parameters_of(shell), described_options(shell)
        assert {"round_to", "verify"} <= set(names) and "ignored_layers" not in names
        assert not [name for name in names if not texts.get(name)]
        assert list(names)[:4] == ["model", "config_list", "evaluator", "existed_wrappers"]
    assert {"beta", "solver", "allocator", "label_fn"} <= set(parameters_of(nni_plugins.ITPruner))
    assert {"threshold", "schedule"} <= set(parameters_of(nni_plugins.PSAPPruner))


@pytest.mark.parametrize("shell", [*SHELLS, tpi.BudgetPruner, tpi.PSAPPruner])
def test_a_misspelt_option_is_an_error_before_anything_runs(shell):
    given = {"importance": tpi.OBSImportance()} if shell is tpi.BudgetPruner else {}
    with pytest.raises(TypeError, match=rf"{shell.__name__} takes no option 'roundto'; did you mean 'round_to'\?"):
        loader = () if shell is tpi.PSAPPruner else ([],)
        shell(None, None, *loader, budget=tpi.Budget(macs=0.5), roundto=8, **given)


def test_an_importance_in_a_shell_that_has_one():
    with pytest.raises(TypeError, match="OBSPruner takes no option 'importance'"):
        tpi.OBSPruner(None, None, [], budget=tpi.Budget(macs=0.5), importance=tpi.CATROImportance())


def test_subclasses_have_signatures_of_their_own():
    class Mine(MethodPruner):
        """Mine.

        Args:
            model: it.
        """

        importance_class = tpi.OBSImportance

    class Other(Mine):
        """Other."""

        importance_class = tpi.PSAPImportance

    assert "ridge" in parameters_of(Mine) and "ridge" not in parameters_of(Other)
    assert "ratio" in parameters_of(Other) and "ratio: fraction of every group" in Other.__doc__


def test_a_constructor_of_ones_own_has_its_own_signature():
    class Plain(tpi.BudgetPruner):
        def __init__(self, model, x, *, foo=3):
            super().__init__(model, x, importance="l1")

    class Open(tpi.BudgetPruner):
        def __init__(self, model, x, *, foo=3, **options):
            super().__init__(model, x, importance="l1", **options)

    assert list(parameters_of(Plain)) == ["model", "x", "foo"]
    assert {"foo", "round_to", "verify"} <= set(parameters_of(Open))


def test_options_of_a_method_go_with_the_object():
    with pytest.raises(
        TypeError, match=r"'class_weight' is an option of CATROImportance: give the object, method=CATRO"
    ):
        tpi.prune(None, None, [], budget=tpi.Budget(macs=0.5), method="catro", class_weight=0.3)


def test_prune_takes_a_method_not_an_importance():
    with pytest.raises(TypeError, match="prune takes no option 'importance'"):
        tpi.prune(None, None, [], budget=tpi.Budget(macs=0.5), importance="l1")
    with pytest.raises(TypeError, match="PruningTarget takes no option 'rond_to'; did you mean 'round_to'"):
        PruningTarget(None, None, rond_to=3)
