"""Options of the wrong type, or of another network: one error that names the option, the value and the remedy."""

from __future__ import annotations

import copy

import pytest
import torch
import torch_pruning as tp
from torch import nn

from tp_importance import bake_weights, label_groups, prunable_groups
from tp_importance.errors import TracingError


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Conv2d(6, 2, 3))


NET, X = network(), torch.randn(2, 3, 8, 8)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"ignored_layers": ["0"]}, TypeError, "takes modules, parameters or module types, not '0'"),
        ({"ignored_layers": NET[0]}, TypeError, "must be a list of modules"),
        ({"ignored_layers": (m for m in NET)}, TypeError, "must be a list of modules"),
        ({"ignored_layers": [int]}, TypeError, "int is none"),
        (
            {"ignored_layers": [copy.deepcopy(NET[0])]},
            ValueError,
            r"Conv2d\(3, 8.* is not in Sequential: give the object",
        ),
        (
            {"ignored_layers": [nn.Parameter(X)]},
            ValueError,
            r"parameter of shape \(2, 3, 8, 8\) in ignored_layers is not",
        ),
        ({"num_heads": 4}, TypeError, "must be a dict {projection: heads}, not 4"),
        ({"num_heads": {"0": 2}}, TypeError, "takes modules as keys, not '0'"),
        ({"num_heads": {nn.Linear(2, 2): 2}}, ValueError, "Linear.* in num_heads is not in Sequential"),
        ({"num_heads": {NET[0]: 0}}, ValueError, "0 heads for 0: give a positive whole number"),
        ({"num_heads": {NET[0]: -2}}, ValueError, "-2 heads for 0: give a positive whole number"),
        ({"num_heads": {NET[0]: 2.0}}, ValueError, "2.0 heads for 0: give a positive whole number"),
        ({"unwrapped_parameters": {NET[0].weight: 0}}, TypeError, r"list of pairs \(parameter, axis\), not dict"),
        ({"unwrapped_parameters": [NET[0].weight]}, TypeError, r"list of pairs \(parameter, axis\), not of Parameter"),
        ({"unwrapped_parameters": [("0.weight", 0)]}, TypeError, r"not of \('0.weight', 0\)"),
        ({"unwrapped_parameters": [(NET[0].weight, 4)]}, ValueError, r"0.weight of shape .* has axes 0..3, not 4"),
        ({"unwrapped_parameters": [(nn.Parameter(X), 0)]}, ValueError, "in unwrapped_parameters is not in Sequential"),
        ({"customized_pruners": [NET[0]]}, TypeError, "must be a dict"),
        ({"customized_pruners": {"0": tp.pruner.function.ConvPruner()}}, TypeError, "types as keys, not '0'"),
        ({"customized_pruners": {NET[0]: tp.pruner.function.ConvPruner}}, TypeError, r"a class, give ConvPruner\(\)"),
        ({"customized_pruners": {NET[0]: 3}}, TypeError, r"3 for Conv2d.* has no prune_out_channels.*BasePruningFunc"),
        ({"forward_fn": "run"}, TypeError, "forward_fn must be a function, not 'run'"),
        ({"output_transform": 3}, TypeError, "output_transform must be a function, not 3"),
        ({"verify": "yes"}, TypeError, "verify must be True, False or a function"),
        ({"verify": lambda groups, x: None}, TypeError, "verify must return a dict .*, not None"),
        ({"verify": lambda groups, x: {"0": 3}}, TypeError, "verify must return a dict .*, not {'0': 3}"),
    ],
)
def test_options_are_refused_by_name(options, kind, message):
    with pytest.raises(kind, match=message):
        prunable_groups(NET, X, **options)


def test_lists_that_are_empty_or_name_types_that_do_not_occur():
    everything = {"ignored_layers": [], "num_heads": {}, "unwrapped_parameters": [], "customized_pruners": {}}
    assert prunable_groups(NET, X, **everything).names == ["0", "3"]
    assert prunable_groups(NET, X, ignored_layers=[nn.LayerNorm]).names == ["0", "3"]


def test_a_layer_of_a_copy_is_not_ignored_in_silence():
    """Torch-Pruning itself would prune the layer that was to stay."""
    model, twin = network(), network()
    with label_groups(), pytest.raises(ValueError, match=r"Conv2d\(3, 8.* in ignored_layers is not in Sequential"):
        tp.pruner.BasePruner(model, X, tp.importance.MagnitudeImportance(), ignored_layers=[twin[0]])
    with pytest.raises(ValueError, match=r"Conv2d\(3, 8.* in ignored_layers is not in Sequential"):
        bake_weights(model, X, ignored_layers=[twin[0]])


def test_an_empty_batch():
    with pytest.raises(ValueError, match="example_inputs hold no sample: the first dimension of the first tensor is 0"):
        prunable_groups(NET, X[:0])


def test_an_output_transform_without_tensors_is_named():
    with pytest.raises(TracingError, match="output_transform returns no tensor, but NoneType"):
        prunable_groups(NET, X, output_transform=lambda output: None)


def test_nothing_to_prune_is_said_aloud():
    """Torch-Pruning's step would remove nothing in silence."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Softmax(1), nn.Conv2d(8, 6, 3))
    with label_groups(), pytest.warns(UserWarning, match=r"Sequential has no group that can be pruned \(0: "):
        tp.pruner.BasePruner(model, X, tp.importance.MagnitudeImportance())
