"""Random graphs: exact costs, masked = removed, budgets met or rightly refused, histories that repeat, names that stay.

All 500 of them are in `make bench-zoo`.
"""

from __future__ import annotations

import pytest

pytest.importorskip("hypothesis")

import torch
import torch_pruning as tp

from benchmarks.zoo.drawn.checks import examine
from benchmarks.zoo.drawn.program import OPERATIONS, Program
from benchmarks.zoo.drawn.strategy import each
from tp_importance import label_groups


@pytest.mark.slow
@pytest.mark.parametrize("start", [100, 101, 102])
def test_random_graphs(start):
    each(examine, number=6, start=start)


def prune_by_host(program: Program) -> None:
    """Torch-Pruning's own pruners, on our groups, remove what keeps the network whole, and can repeat it."""
    for kind, options in ((tp.pruner.BasePruner, {}), (tp.pruner.GroupNormPruner, {"global_pruning": True})):
        pruners = []
        for _ in range(2):
            model, x = program.network()
            with label_groups(verify=model.fixes_sizes):
                importance = tp.importance.GroupMagnitudeImportance(p=2)
                pruners.append(kind(model, x, importance=importance, pruning_ratio=0.5, **options))
        first, second = pruners
        promised = first.DG.groups
        before = promised.widths
        first.step()
        first.model(x)
        left = first.DG.groups.widths
        if any(g.n_units > 2 * g.min_units for g in promised) and not options:
            assert sum(left.values()) < sum(before.values())
        second.load_pruning_history(first.pruning_history())
        for a, b in zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.slow
def test_the_hosts_own_pruners_on_random_graphs():
    each(prune_by_host, number=20, start=200)


def test_a_group_does_not_start_at_a_layer_that_sees_fewer_of_its_channels():
    steps = (("squeeze-excite", (4, 0, 4, 3)), ("unflatten", (5, 5, 3, 1)), ("divide", (1, 0, 5, 4)))
    prune_by_host(Program(2, 2, (*steps, ("activation", (5, 6, 0, 4)))))


def test_every_operation_makes_a_node():
    """What a step adds to a program is in the network, and the network runs as it did when it was built."""
    numbers = [(0, 0, 0, 0), (0, 1, 1, 1), (0, 6, 2, 0), (0, 4, 0, 6), (5, 3, 5, 3)]
    before = (("conv", (0, 6, 0, 0)), ("conv", (0, 6, 0, 0)))
    fewest = len(Program(2, 3, before).network()[0].nodes)
    for name in OPERATIONS:
        first = (("flatten", (0, 0, 0, 0)),) if name == "unflatten" else ()
        made = []
        for n in numbers:
            net, x = Program(2, 3, (*before, *first, (name, n))).network()
            made.append(len(net.nodes))
            assert net(x).shape == (2, 3)
        assert max(made) > fewest, name


def test_numbers_of_channels_that_the_code_names_are_refused_by_the_verification():
    program = Program(2, 3, (("flatten", (0, 0, 0, 0)), ("unflatten", (0, 0, 0, 6))))
    assert program.network()[0].fixes_sizes and examine(program) == {"groups": 0, "excluded": ["output", "unverified"]}


def test_the_same_seed_draws_the_same_programs():
    drawn: list[list[Program]] = [[], []]
    for programs in drawn:
        each(programs.append, number=5, start=3)
    assert drawn[0] == drawn[1] and len(set(drawn[0])) > 2


def test_a_fault_shrinks():
    """Any list of steps is a program, so that what does not matter is left out."""
    seen: list[Program] = []

    def refuse(program: Program) -> None:
        if any(name == "grouped" for name, _ in program.steps):
            seen.append(program)
            raise AssertionError("a grouped convolution")

    with pytest.raises(AssertionError, match="a grouped convolution"):
        each(refuse, number=100, start=0)
    names = [name for name, _ in seen[-1].steps]
    assert names.count("grouped") == 1 and set(names) <= {"grouped", "conv"}
    assert all(numbers == (0, 0, 0, 0) for _, numbers in seen[-1].steps)
