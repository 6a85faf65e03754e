"""Allocators by name: one place, no duplicates."""

import numpy as np
import pytest
import torch
import torch_pruning as tp

from tp_importance import Budget, BudgetPruner
from tp_importance.allocation import registry
from tp_importance.allocation.program import ProgramAllocator
from tp_importance.allocation.registry import ALLOCATORS, find_allocator, named_allocator, register_allocator
from tp_importance.testing import make_network


def narrowest(curves, cost, space, limits):
    return space.floor


@pytest.fixture
def registered():
    register_allocator("narrowest", narrowest)
    try:
        yield "narrowest"
    finally:
        del registry._ALLOCATORS["narrowest"]


def test_a_registered_allocator_is_found_by_name(registered):
    assert ALLOCATORS[registered] is narrowest and find_allocator(registered) is narrowest
    model, x = make_network("plain")
    pruner = BudgetPruner(
        model, x, importance=tp.importance.MagnitudeImportance(), budget=Budget(macs=0.9), allocator=registered
    )
    assert np.array_equal(pruner.cost_model.units(pruner.plan().widths), pruner.space.floor)


def test_names_are_taken_once(registered):
    for name in (registered, "greedy", "default"):
        with pytest.raises(ValueError, match=f"called '{name}' already"):
            register_allocator(name, narrowest)
    assert find_allocator(registered) is narrowest


@pytest.mark.parametrize("name", ["", "two words", "1st", None, 3])
def test_names_are_identifiers(name):
    with pytest.raises(ValueError, match="give it an identifier"):
        register_allocator(name, narrowest)


@pytest.mark.parametrize("given", [None, "greedy", 3, ProgramAllocator, torch.zeros(2)])
def test_only_functions_are_registered(given):
    with pytest.raises(TypeError, match="must be a function"):
        register_allocator("mine", given)
    assert "mine" not in ALLOCATORS


def test_the_table_is_read_only():
    assert list(ALLOCATORS) == ["greedy", "uniform", "program", "lagrange"]
    with pytest.raises(TypeError):
        ALLOCATORS["mine"] = narrowest


def test_the_program_takes_the_weights_of_the_importance():
    weights = {"a": 2.0}
    found = named_allocator("program", weights)
    assert isinstance(found, ProgramAllocator) and found.weights is weights
    assert named_allocator("greedy", weights) is ALLOCATORS["greedy"]
