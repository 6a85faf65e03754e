"""Masks on transformers and networks with group norms: the wrapped network computes what the sped-up one does."""

import copy
import warnings

import pytest
import torch

pytest.importorskip("nni")

from nni.compression.distillation import DynamicLayerwiseDistiller
from nni.compression.pruning import AGPPruner

from helpers.norm_networks import norm_network
from nni_plugins import CATROPruner, ITPruner, OBSPruner, PSAPPruner, refit_masks, speedup
from nni_plugins.testing import TrainingLog, hooks, make_evaluator
from tp_importance import Budget, PSAPSchedule, count_ops

pytestmark = pytest.mark.usefixtures("one_thread")

ALL = [{"op_types": ["Linear", "Conv2d"], "sparse_ratio": 0.5}]
NETWORKS = ["prenorm", "postnorm", "rms", "groupnorm", "response"]


def data():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(16, 3, 8, 8, generator=generator), torch.arange(16) % 3) for _ in range(2)]


def run(model, x):
    with torch.no_grad():
        return model.eval()(x)


def assert_sped_up(pruner, model, masks, x, unit=None):
    """The masked network is the smaller one, and no hook stays."""
    wrapped = run(model, x)
    pruner.unwrap_model()
    assert not hooks(model)
    dense = run(model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a difference
        speedup(model, x, masks)
    small = run(model, x)
    scale = small.abs().max()
    assert float((wrapped - small).abs().max() / scale) <= 1e-5 < float((dense - small).abs().max() / scale)


@pytest.mark.parametrize("budget", [None, Budget(macs=0.5)], ids=["ratio", "budget"])
@pytest.mark.parametrize("kind", [OBSPruner, CATROPruner, ITPruner])
@pytest.mark.parametrize("name", ["prenorm", "groupnorm"])
def test_masked_is_sped_up(name, kind, budget):
    model, x, groups = norm_network(name)
    before = count_ops(model, x)[0]
    pruner = kind(model, ALL, loader=data(), budget=budget, example_inputs=x)
    assert pruner._target.groups.names == groups.names
    _, masks = pruner.compress()
    assert any((masks[g.name]["weight"] == 0).any() for g in groups if g.statistics) or kind is OBSPruner
    assert_sped_up(pruner, model, masks, x)
    assert budget is None or count_ops(model, x)[0] <= 0.5 * before


@pytest.mark.parametrize("name", NETWORKS)
def test_all_kinds_of_norms(name):
    model, x, groups = norm_network(name)
    pruner = CATROPruner(model, ALL, loader=data(), example_inputs=x)
    _, masks = pruner.compress()
    assert all((masks[g.producers[0].name]["weight"] == 0).any() for g in groups)
    assert_sped_up(pruner, model, masks, x)


@pytest.mark.parametrize("name", ["prenorm", "rms", "groupnorm"])
def test_trained_masked_and_sped_up(name):
    model, x, _ = norm_network(name)
    evaluator = make_evaluator(model, data(), TrainingLog())
    schedule = PSAPSchedule(prune_steps=2, begin=0.2, end=0.6, pulse=2)
    pruner = PSAPPruner(model, ALL, evaluator, budget=Budget(macs=0.6), schedule=schedule, example_inputs=x)
    model, masks = pruner.compress(max_steps=10, max_epochs=None)
    assert_sped_up(pruner, model, masks, x)


def test_under_a_schedule():
    """Between the steps of a schedule the network trains as the smaller one would."""
    model, x, _ = norm_network("prenorm")
    evaluator = make_evaluator(model, data(), TrainingLog())
    pruner = CATROPruner(model, ALL, evaluator, loader=data(), budget=Budget(macs=0.5), example_inputs=x)
    schedule = AGPPruner(pruner, interval_steps=2, total_times=3)
    _, masks = schedule.compress(max_steps=8, max_epochs=None)
    assert_sped_up(pruner, model, masks, x)


def test_linear_layers_alone():
    """Of a stream that a convolution begins, the linear layers alone take nothing; heads and MLPs go."""
    model, x, groups = norm_network("prenorm")
    with pytest.warns(UserWarning, match="shares its channels with patch, which config_list does not select"):
        pruner = OBSPruner(model, [{"op_types": ["Linear"], "sparse_ratio": 0.5}], loader=data(), example_inputs=x)
    assert pruner._target.groups.names == [g.name for g in groups if not g.statistics]
    _, masks = pruner.compress()
    heads = masks["blocks.0.qkv"]["weight"].flatten(1).any(1).view(3, 3, 4)  # q, k, v; head; dimension
    assert torch.equal(heads, heads[:1, :, :1].expand_as(heads)) and int(heads[0, :, 0].sum()) == 2
    assert not any(m._forward_hooks for m in (model.norm, model.blocks[0].n1))
    assert_sped_up(pruner, model, masks, x)


def test_refitted_masks():
    """The refit sees the statistics that the smaller network has."""
    model, x, _ = norm_network("prenorm")
    pruner = CATROPruner(model, ALL, loader=data(), budget=Budget(macs=0.6), example_inputs=x)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    dense, twin = run(model, data()[0][0]), copy.deepcopy(model)
    report = refit_masks(model, masks, data(), x)
    assert not any(row.skipped for row in report.rows) and all(row.after <= row.before for row in report.rows)
    for network in (model, twin):
        speedup(network, x, masks)
    error = [float((run(n, data()[0][0]) - dense).square().mean()) for n in (model, twin)]
    assert error[0] < 0.5 * error[1]


def test_masks_on_and_off_again():
    model, x, _ = norm_network("prenorm")
    dense = run(model, x)
    pruner = CATROPruner(model, ALL, loader=data(), example_inputs=x)
    ones = pruner.get_masks()
    _, masks = pruner.compress()
    masked = run(model, x)
    pruner.unwrap_model()
    assert torch.equal(run(model, x), dense) and not hooks(model)
    pruner.wrap_model()
    assert torch.equal(run(model, x), masked)
    pruner.update_masks({n: {t: torch.ones_like(m) for t, m in ts.items() if m is not None} for n, ts in masks.items()})
    torch.testing.assert_close(run(model, x), dense)
    pruner.update_masks(masks)
    assert torch.equal(run(model, x), masked) and ones.keys() == masks.keys()
    for wrapper in pruner._module_wrappers.values():  # as a compressor does that shares them
        wrapper.unwrap()
    assert torch.equal(run(model, x), dense) and not hooks(model)


def test_fused_with_a_distiller():
    model, x, _ = norm_network("prenorm")
    teacher, _, _ = norm_network("prenorm")
    evaluator = make_evaluator(model, data(), TrainingLog())
    pruner = CATROPruner(model, ALL, evaluator, loader=data(), budget=Budget(macs=0.5), example_inputs=x)
    config = [{"op_names": ["norm"], "lambda": 0.1, "apply_method": "mse"}]
    distiller = DynamicLayerwiseDistiller.from_compressor(pruner, config, teacher, lambda b, m: m(b[0]))
    distiller.compress(max_steps=6, max_epochs=None)
    masks, wrapped = pruner.get_masks(), run(model, x)
    distiller.unwrap_model()
    speedup(model, x, masks)
    torch.testing.assert_close(run(model, x), wrapped, rtol=1e-5, atol=1e-5)
    assert not hooks(model)
