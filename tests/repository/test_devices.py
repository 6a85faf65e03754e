"""The default device is the user's: new tensors of ours say where they are."""

import ast
from pathlib import Path

import pytest
import torch
from torch import nn

from tp_importance import Budget, bake_weights, prunable_groups, prune
from tp_importance.testing import same_values

ROOT = Path(__file__).parents[2]
FACTORIES = {
    "arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm", "tensor",
    "tril_indices", "triu_indices", "zeros",
}  # fmt: skip


def calls(path):
    for node in ast.walk(ast.parse(path.read_text())):
        function = node.func if isinstance(node, ast.Call) else None
        if isinstance(function, ast.Attribute) and ast.unparse(function.value) == "torch":
            yield function.attr, node


@pytest.mark.parametrize("package", ["tp_importance", "nni_plugins"])
def test_every_new_tensor_has_a_device(package):
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sorted((ROOT / package).rglob("*.py"))
        if "testing" not in path.parts
        for name, node in calls(path)
        if name in FACTORIES and not any(keyword.arg == "device" for keyword in node.keywords)
    ]
    assert not found


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


@pytest.mark.parametrize("method", ["obs", "catro", "itpruner", "psap", "l2", "taylor", "random"])
def test_another_default_device_changes_nothing(method):
    """A default device of tensors without values: whatever lands there is missed."""
    generator = torch.Generator().manual_seed(0)
    loader = [(torch.randn(8, 3, 10, 10, generator=generator), torch.arange(8) % 4) for _ in range(2)]
    x, nets = loader[0][0][:2], [network(), network()]
    options = {"budget": Budget(macs=0.5), "method": method}
    prune(nets[0], x, loader, **options)
    with torch.device("meta"):
        bake_weights(nets[1], x)
        assert prunable_groups(nets[1], x).names == ["0", "3"]
        prune(nets[1], x, loader, **options)
    assert same_values(*nets)
