"""Real architectures all the way: convert, remove, fuse, prune channels, export."""

import io
import warnings

import pytest
import torch
import torch_pruning as tp
from torch import nn

from helpers.networks import ZOO
from helpers.paths import DATA
from helpers.resconv_cases import masked
from tp_importance import Budget, BudgetPruner, count_ops, load_pruned, save_pruned
from tp_importance.budget import Cost
from tp_importance.methods.resconv import (
    ResConv2d,
    ResConvPruner,
    Scale,
    convert_to_resconv,
    fuse,
    remove_layers,
    resconv_layers,
)
from tp_importance.methods.resconv.costs import LayerCosts
from tp_importance.testing.networks import randomise_batchnorm

NETWORKS = {"resnet50": 14, "vgg16_bn": 9, "mobilenet_v2": 13, "densenet": 2, "googlenet": 1, "resnet18": 13}
"""How many layers are converted; of ResNet-50 13 of the 3×3 convolutions and one 1×1."""


def fresh(name: str) -> nn.Module:
    model = ZOO[name]()
    if name == "vgg16_bn":  # ONNX cannot pool 2×2 to 7×7
        model.avgpool = nn.Identity()
        model.classifier = nn.Sequential(nn.Linear(512 * 4, 64), nn.ReLU(True), nn.Dropout(), nn.Linear(64, 10))
    return model


def halved(model: nn.Module) -> list[str]:
    """Give the factors random values; a random half of the layers is to go."""
    generator = torch.Generator().manual_seed(0)
    layers = resconv_layers(model)
    for layer in layers.values():
        layer.a.data.uniform_(0.2, 2, generator=generator)
        layer.s.data.uniform_(0.5, 1, generator=generator)
    order = torch.randperm(len(layers), generator=generator)
    return [list(layers)[i] for i in sorted(order[: (len(layers) + 1) // 2].tolist())]


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-4) -> bool:
    return bool((a - b).abs().max() <= tolerance * a.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_all_the_way(name, tmp_path):
    import onnxruntime

    torch.manual_seed(0)
    model, x = fresh(name), torch.randn(2, 3, 64, 64)
    randomise_batchnorm(model, x)
    with torch.no_grad():
        y, dense = model(x), Cost(*count_ops(model, x))
        convert_to_resconv(model, x)
        assert torch.equal(model(x), y)
        names = halved(model)
        costs = LayerCosts.of(model, x)
        assert costs.dense == dense and len(resconv_layers(model)) == NETWORKS[name]
        y = masked(model, names)(x)
        report = remove_layers(model, x, names)
        assert close(y, model(x))
        if resconv_layers(model):
            fuse(model)
        assert close(y, model(x)) and Cost(*count_ops(model, x)) == costs.without(names)
    assert not any(isinstance(m, ResConv2d) for m in model.modules())
    save_pruned(model, tmp_path / "m.pt")
    assert torch.equal(load_pruned(lambda: fresh(name), tmp_path / "m.pt")(x), model(x))
    assert all(isinstance(model.get_submodule(n), Scale) for n in report.kept_scales)
    model.train()(torch.cat([x, x])).square().sum().backward()  # can be trained on
    model.eval()
    inner = tp.importance.MagnitudeImportance(p=2)
    pruner = BudgetPruner(model, x[:1], importance=inner, budget=Budget(macs=0.8))
    assert pruner.step().cost.macs <= 0.8 * costs.without(names).macs
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y = model(x)
        exported = torch.export.export(model, (x,))
        assert close(y, exported.module()(x))
        buffer = io.BytesIO()
        torch.onnx.export(model, (x,), buffer, dynamo=False)
    session = onnxruntime.InferenceSession(buffer.getvalue(), providers=["CPUExecutionProvider"])
    (again,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert close(y, torch.from_numpy(again))


@pytest.mark.skipif(
    not list((DATA / "weights").glob("resnet20-*.th")),
    reason=f"no pretrained weights in {DATA}; set TP_IMPORTANCE_DATA",
)
def test_a_pretrained_network(tmp_path):
    from benchmarks.networks import cifar_resnet as network

    model, x = network(DATA, "resnet20"), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = model(x)
        pruner = ResConvPruner(model, x, budget=Budget(macs=0.6))
        assert torch.equal(model(x), y) and len(pruner.layers) == 16
        halved(model)
        expected = masked(model, pruner.plan().removed)(x)
        report = pruner.step()
        assert close(expected, model(x)) and report.cost.macs <= 0.6 * report.dense.macs and not report.kept_scales
        save_pruned(model, tmp_path / "m.pt")
        assert torch.equal(load_pruned(lambda: network(DATA, "resnet20"), tmp_path / "m.pt")(x), model(x))
    channels = BudgetPruner(model, x, importance=tp.importance.MagnitudeImportance(p=2), budget=Budget(macs=0.8))
    assert channels.step().cost.macs <= 0.8 * report.cost.macs
    model.train()(x).square().sum().backward()
