"""ResConvPruner in training: proximal steps, checkpoints; its report; its factors as importance of channels."""

import json

import pytest
import torch
import torch_pruning as tp
from torch import nn

from helpers.resconv_cases import X32, X, fresh, ready, resnet, train, vgg
from tp_importance import Budget, BudgetPruner, load_pruned, save_pruned
from tp_importance.methods.resconv import (
    LayerReport,
    ResConv2d,
    ResConvImportance,
    ResConvPruner,
    convert_to_resconv,
    fuse,
)
from tp_importance.testing import same_values


def test_parameter_groups():
    pruner = fresh()
    rest, scalars = pruner.parameter_groups(weight_decay=0.1, lr=0.5)
    ids = [id(p) for group in (rest, scalars) for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in pruner.model.parameters()) and len(set(ids)) == len(ids)
    assert rest["weight_decay"] == 0.1 and scalars["weight_decay"] == 0 and scalars["lr"] == 0.5 and "lr" not in rest
    assert {id(p) for p in scalars["params"]} == {id(p) for m in pruner.layers.values() for p in (m.s, m.a)}


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
def test_proximal_step(make):
    pruner = fresh(reg=0.5)
    extra = {"momentum": 0.9} if make in (torch.optim.SGD, torch.optim.RMSprop) else {}
    optimizer = make(pruner.parameter_groups(lr=0.2), lr=1e-3, **extra)
    train(pruner.model, optimizer, steps=1)
    one, two, three = list(pruner.layers.values())[:3]
    for layer, s, a in ((one, 0.05, -0.3), (two, -0.4, 0.7), (three, 0.1, 0.0)):
        layer.s.data.fill_(s)
        layer.a.data.fill_(a)
    others = {n: p.clone() for n, p in pruner.model.named_parameters() if n.split(".")[-1] not in "sa"}
    pruner.regularize(optimizer)
    assert [one.s.item(), two.s.item(), three.s.item()] == pytest.approx([0, -0.3, 0])
    assert one.s.item() == 0 and one.a.item() == 0 and two.a.item() == pytest.approx(0.7)
    moments = [k for k in ("momentum_buffer", "exp_avg") if k in optimizer.state[one.s]]
    assert moments and all(optimizer.state[one.s][k].item() == 0 for k in moments)
    assert all(optimizer.state[two.s][k].item() != 0 for k in moments)
    assert all(torch.equal(p, others[n]) for n, p in pruner.model.named_parameters() if n in others)


def test_factors_reach_zero_exactly_and_stay():
    pruner = fresh(reg=1.0)
    optimizer = torch.optim.SGD(pruner.parameter_groups(lr=0.1), lr=1e-4, momentum=0.9)
    train(pruner.model, optimizer, pruner, steps=30)
    assert all(m.a.item() >= 0 for m in pruner.layers.values())
    assert sum(m.s.item() == 0 for m in pruner.layers.values()) >= 3


def test_regularize_refuses():
    pruner, model = None, resnet()
    early = torch.optim.SGD(model.parameters(), 0.1)
    pruner = ResConvPruner(model, X32, budget=Budget(macs=0.7))
    with pytest.raises(ValueError, match="does not hold the factor of layer"):
        pruner.regularize(early)
    with pytest.raises(TypeError, match=r"regularize\(optimizer\)"):
        pruner.regularize(model)
    optimizer = torch.optim.SGD(pruner.parameter_groups(), 0.1)
    for layer in pruner.layers.values():
        layer.s.requires_grad_(False)
    before = [layer.s.item() for layer in pruner.layers.values()]
    pruner.regularize(optimizer)  # frozen factors stay
    assert [layer.s.item() for layer in pruner.layers.values()] == before
    with pytest.warns(UserWarning, match="a=0"):
        pruner.step()
    with pytest.raises(RuntimeError, match="fused"):
        pruner.regularize(optimizer)


@pytest.mark.parametrize("removed", [False, True])
def test_resume_in_mid_training(removed, tmp_path):
    def start():
        pruner = ResConvPruner(ready(resnet()).float(), X32, budget=Budget(macs=0.7))
        return pruner, torch.optim.Adam(pruner.parameter_groups(weight_decay=0.1, lr=0.05), lr=1e-3)

    pruner, optimizer = start()
    if removed:
        pruner.step(Budget(macs=0.9), fuse=False)
        optimizer = torch.optim.Adam(pruner.parameter_groups(weight_decay=0.1, lr=0.05), lr=1e-3)
    train(pruner.model, optimizer, pruner)
    save_pruned(pruner.model, tmp_path / "model.pt")
    torch.save({"optimizer": optimizer.state_dict(), "pruner": pruner.state_dict()}, tmp_path / "rest.pt")
    train(pruner.model, optimizer, pruner, seed=1)

    saved = torch.load(tmp_path / "rest.pt", weights_only=True)
    model = load_pruned(lambda: convert_to_resconv(resnet().double(), X).float(), tmp_path / "model.pt")
    again = ResConvPruner(model, X32, budget=Budget(macs=0.7))
    resumed = torch.optim.Adam(again.parameter_groups(weight_decay=0.1, lr=0.05), lr=1e-3)
    again.load_state_dict(saved["pruner"])
    resumed.load_state_dict(saved["optimizer"])
    assert again.dense == pruner.dense
    train(model, resumed, again, seed=1)
    assert same_values(model, pruner.model)
    assert again.step() == pruner.step()
    assert same_values(model, pruner.model)
    with pytest.raises(ValueError, match="state is of another network"):
        again.load_state_dict(saved["pruner"])


# --- report and importance --------------------------------------------------------------------------------------------


def test_report():
    report = fresh(Budget(macs=0.5)).step()
    assert LayerReport.from_dict(json.loads(report.to_json())) == report
    text = str(report)
    assert f"{len(report.removed)} of 6 layers removed" in text and "limit" in text
    assert all(name in text for name in (*report.removed, *report.collapsed))
    frame = report.to_frame()
    assert list(frame.name[frame.removed]) == report.removed and len(frame) == 6
    assert sum(r.macs for r in report.rows if r.removed) == report.dense.macs - report.cost.macs


def test_importance_for_channels():
    model = ready(vgg()).float()
    importance = ResConvImportance(model)
    assert importance.scales == {n: abs(m.s.item()) for n, m in model.named_modules() if isinstance(m, ResConv2d)}
    with pytest.raises(ValueError, match="no layer scaling factors"):
        ResConvImportance(vgg())
    fuse(model)
    graph = tp.DependencyGraph().build_dependency(model, X32)
    inner = importance.importance
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d) and name in importance.scales:
            group = graph.get_pruning_group(layer, tp.prune_conv_out_channels, list(range(layer.out_channels)))
            torch.testing.assert_close(importance(group), inner(group) * importance.scales[name])
    pruner = BudgetPruner(model, X32, importance=importance, budget=Budget(macs=0.5))
    assert pruner.step().cost.macs <= 0.5 * pruner.dense.macs and model(X32).shape == (2, 4)
