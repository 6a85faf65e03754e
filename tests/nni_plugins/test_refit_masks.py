import copy
import warnings

import pytest
import torch
from torch import nn

pytest.importorskip("nni")

from nni.compression.pruning import L1NormPruner

from helpers.states import state
from nni_plugins import CATROPruner, refit_masks, speedup
from tp_importance import Recovery, prunable_groups, recover
from tp_importance.graph.surgery import remove_units
from tp_importance.refitting.refit import refit_consumers
from tp_importance.testing import class_loader, make_network


def masks_of(model, groups, removed, members=("producer",)):
    """Masks of the layers that make the removed units; batch norms are not aligned."""
    masks = {}
    for name, units in removed.items():
        for m in groups[name].members:
            if m.role == "out" and m.kind in members:
                module = model.get_submodule(m.name)
                dim = 1 if getattr(module, "transposed", False) else 0
                mask = masks.setdefault(m.name, {"weight": torch.ones_like(module.weight)})
                mask["weight"].transpose(0, dim)[m.positions(units)] = 0
                if module.bias is not None:
                    mask.setdefault("bias", torch.ones_like(module.bias))[m.positions(units)] = 0
    return masks


@pytest.mark.parametrize(
    ("name", "mode"), [("residual", "sequential"), ("concat", "parallel"), ("flatten", "parallel")]
)
def test_masks_give_what_our_surgery_gives(name, mode):
    model, x = make_network(name)
    twin, data = copy.deepcopy(model), class_loader(32)
    groups = prunable_groups(model, x)
    removed = {g.name: list(range(0, g.n_units - 1, 3)) for g in groups}
    masks = masks_of(model, groups, removed)
    report = refit_masks(model, masks, data, x, mode, groups=groups)
    twins = prunable_groups(twin, x, verify=False)
    assert report == refit_consumers(twin, x, data, removed, mode, groups=twins) and report.rows
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # batch norms are not masked, and yet nothing differs
        speedup(model, x, masks)
    remove_units(twins, removed)
    ours, theirs = twin.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        torch.testing.assert_close(theirs[key], value)


@pytest.mark.parametrize("ours", [True, False])
def test_masks_of_a_pruner(ours):
    model, x = make_network("plain")
    data, dense = class_loader(32), copy.deepcopy(model)
    if ours:
        config = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
        pruner = CATROPruner(model, config, loader=data)
    else:
        pruner = L1NormPruner(model, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])
    _, masks = pruner.compress()
    with pytest.raises(RuntimeError, match="still wrapped"):
        refit_masks(model, masks, data, x, refit="parallel")
    pruner.unwrap_model()
    report = refit_masks(model, masks, data, x, refit="parallel")
    assert len(report.rows) == 3 and all(r.after < r.before for r in report.rows)
    speedup(model, x, masks)
    assert model(x).shape == dense(x).shape and model[1][0].in_channels == 4
    report = recover(model, dense, data, Recovery(epochs=5, autocast=False))
    assert report.after < report.before


def test_a_unit_goes_only_if_all_its_layers_are_masked():
    model, x = make_network("residual")
    groups = prunable_groups(model, x)
    coupled = next(g for g in groups if len(g.producers) > 1)
    masks = masks_of(model, groups, {coupled.name: [0, 1]})
    first = coupled.producers[0].name
    del masks[first]
    before = state(model)
    report = refit_masks(model, masks, class_loader(32), x, groups=groups, refit="parallel")
    assert {r.name for r in report.rows} == {m.name for m in coupled.consumers}
    assert all("not all layers" in r.skipped for r in report.rows)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_refused_groups_are_reported():
    model, x = make_network("residual")
    name = prunable_groups(model, x, verify=False).names[0]
    groups = prunable_groups(model, x, verify=lambda _groups, _inputs: {name: "removal is not masking"})
    (refused,) = (e for e in groups.excluded if e.kind == "unverified")
    masks = {layer: {"weight": torch.ones_like(model.get_submodule(layer).weight)} for layer in refused.layers}
    for mask in masks.values():
        mask["weight"][0] = 0
    report = refit_masks(model, masks, class_loader(32), x, groups=groups, refit="parallel")
    assert report.rows and all("removal is not masking" in r.skipped for r in report.rows)


def test_the_model_is_unchanged_after_an_exception():
    model, x = make_network("plain")
    before = state(model)
    mask = torch.ones_like(model[0][0].weight)
    with pytest.raises(ValueError, match="remove nothing"):
        refit_masks(model, {"0.0": {"weight": mask}}, class_loader(), x, refit="parallel")
    mask[2] = 0
    with pytest.raises(ValueError, match="gave no batch"):
        refit_masks(model, {"0.0": {"weight": mask}}, [], x, refit="parallel")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert isinstance(model, nn.Module)
