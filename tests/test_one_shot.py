import copy

import pytest
import torch
import torch_pruning as tp
from torch import nn
from torch.utils.data import TensorDataset

from helpers.states import state, weights
from tp_importance import (
    Budget,
    BudgetError,
    BudgetPruner,
    CATROImportance,
    ITPruner,
    OBSPruner,
    Refit,
    ResConvPruner,
    convert_to_resconv,
    count_ops,
    prunable_groups,
    prune,
    recalibrate_batchnorm,
)
from tp_importance.allocation.lagrange import LagrangeAllocator
from tp_importance.allocation.registry import ALLOCATORS
from tp_importance.automl import METHODS, RandomImportance, prune_trial, register_method
from tp_importance.errors import TracingError
from tp_importance.pruning import registry
from tp_importance.refitting.refit import refit_consumers
from tp_importance.statistics.observe import observe
from tp_importance.testing import Snapshot, class_loader, make_network

HALF = Budget(macs=0.5)
NAMES = [name for name, method in METHODS.items() if method.make is not None]
"""Criteria that prune() and searches know."""


@pytest.mark.parametrize("method", [*NAMES, CATROImportance(space="channel"), tp.importance.LAMPImportance()])
def test_every_method_meets_the_budget_in_place(method):
    model, x = make_network("residual")
    result = prune(model, x, class_loader(32), budget=HALF, method=method)
    assert result.model is model and not any(m.training for m in model.modules())
    assert result.report.cost.macs <= 0.5 * result.report.dense.macs
    assert result.report.refit.mode == "sequential" and result.report.refit.rows
    assert model(x).isfinite().all()


def test_the_refit_brings_the_network_closer_to_what_it_was():
    model, x = make_network("residual")
    data = [torch.randn(64, *x.shape[1:], generator=torch.Generator().manual_seed(1))]
    with torch.no_grad():
        wanted, errors = model.eval()(data[0]), {}
        for mode in (None, "parallel", "sequential"):
            twin = copy.deepcopy(model)
            prune(twin, x, data, budget=HALF, method="l1", refit=mode)
            errors[mode] = float((twin(data[0]) - wanted).square().mean())
    assert errors["sequential"] < errors["parallel"] < errors[None]


def test_no_labels_no_batch_norm():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))
    result = prune(model, torch.randn(1, 3, 12, 12), [torch.randn(16, 3, 12, 12)], budget=HALF)
    assert result.report.cost.macs <= 0.5 * result.report.dense.macs


class Counting(list):
    given = 0

    def __iter__(self):
        for batch in super().__iter__():
            self.given += len(batch)
            yield batch


@pytest.mark.parametrize(("samples", "seen"), [(1, 8), (9, 16), (16, 16), (None, 40)])
def test_only_so_many_samples_are_taken(samples, seen):
    model, x = make_network("plain")
    loader = Counting(torch.randn(8, *x.shape[1:]) for _ in range(5))
    prune(model, x, loader, budget=HALF, method="l1", samples=samples)
    assert loader.given == seen  # the sweep reads the loader once


def test_the_same_seed_gives_the_same_network():
    nets = []
    for _ in range(2):
        model, x = make_network("residual")
        prune(model, x, class_loader(32), budget=HALF)
        nets.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*nets)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "l3"}, ValueError, "catro"),
        ({"samples": 0}, ValueError, "samples=0"),
        ({"samples": True}, ValueError, "samples=True"),
        ({"refit": "serial"}, ValueError, "serial"),
        ({"budget": Budget(macs=1)}, BudgetError, "cannot be reached"),
        ({"budget": 0.5}, TypeError, r"Budget\(macs=0.5\), not 0.5"),
        ({"method": None}, TypeError, "method=None cannot value channels"),
        ({"method": 3}, TypeError, "method=3"),
        ({"method": CATROImportance}, TypeError, r"method=CATROImportance is a class.*method=CATROImportance\(\)"),
        ({"allocator": 3}, TypeError, "allocator=3 must be one of"),
        ({"allocator": ["greedy"]}, TypeError, "allocator=.*must be one of"),
        ({"allocator": "gready"}, ValueError, "unknown allocator 'gready'"),
        ({"allocator": LagrangeAllocator}, TypeError, r"make one of it: allocator=LagrangeAllocator\(\)"),
    ],
)
def test_bad_options_leave_the_model_alone(options, error, message):
    model, x = make_network("plain")
    before = state(model)
    with pytest.raises(error, match=message):
        prune(model, x, class_loader(32), **{"budget": HALF, **options})
    after = model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())


def test_a_loader_that_breaks_leaves_the_model_alone():
    class Broken(list):
        def __iter__(self):
            yield from super().__iter__()
            raise OSError("disk")

    model, x = make_network("plain")
    before = state(model)
    with pytest.raises(OSError, match="disk"):
        prune(model, x, Broken(class_loader(32)), budget=HALF, samples=None)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


def test_settings_pass_through():
    model, x = make_network("plain")
    how = Refit("sequential", downstream=False, residual=False)
    report = prune(model, x, class_loader(32), budget=HALF, refit=how, round_to=4).report
    assert all(row.removed for row in report.refit.rows)
    assert all(row.after % 4 == 0 or row.after == row.initial for row in report.rows)


@pytest.mark.parametrize(
    ("model", "message"),
    [(nn.Linear, "not the class Linear"), (lambda x: x, "not function"), (None, "not NoneType")],
)
def test_a_model_that_is_none(model, message):
    with pytest.raises(TypeError, match=f"model must be a torch.nn.Module, {message}"):
        prune(model, torch.zeros(1, 3), [], budget=HALF)


def never(*_):
    raise AssertionError("the model ran")


def test_arguments_are_checked_before_anything_runs():
    model, x = make_network("plain")
    model.forward = never
    good = {"importance": tp.importance.LAMPImportance(), "budget": HALF}
    for bad in ({"importance": CATROImportance}, {"importance": 1}, {"allocator": 3}, {"budget": 0.5}):
        with pytest.raises(TypeError, match=next(iter(bad))):
            BudgetPruner(model, x, [], **{**good, **bad})
    with pytest.raises(TypeError, match="importance=MagnitudeImportance is a class"):
        ITPruner(model, x, [], budget=HALF, importance=tp.importance.MagnitudeImportance)


def test_an_importance_that_is_set_later_is_checked_then():
    model, x = make_network("plain")
    with pytest.raises(TypeError, match="importance=None cannot value channels"):
        BudgetPruner(model, x, importance=None, budget=HALF)
    pruner = BudgetPruner(model, x, importance="random", budget=HALF)
    pruner.importance = None
    with pytest.raises(TypeError, match="importance=None cannot value channels"):
        pruner.plan()
    pruner.importance = tp.importance.LAMPImportance()
    assert pruner.plan().cost.macs <= 0.5 * pruner.dense.macs


X, Y = (torch.cat(parts) for parts in zip(*class_loader(32), strict=True))


@pytest.mark.parametrize("method", ["obs", "catro", "l1"])
@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        (TensorDataset(X, Y), TypeError, "TensorDataset, which gives single samples"),
        ((X, Y), TypeError, r"pass \[\(X, Y\)\]"),
        (X, TypeError, r"pass \[batch\]"),
        ((b for b in [X]), TypeError, r"generator and gives its batches only once.*list\(loader\)"),
        (iter([X]), TypeError, "list_iterator and gives its batches only once"),
        ([], ValueError, "gave no batch"),
        ([(X[:, 0], Y)], RuntimeError, "Given groups=1"),
        ([(x, int(y)) for x, y in zip(X, Y, strict=True)], ValueError, "batch_size=64|got 3D input"),
    ],
)
def test_bad_loaders_leave_the_model_alone(method, loader, error, message):
    model, x = make_network("plain")
    before = state(model)
    with pytest.raises(error, match=message) as caught:
        prune(model, x, loader, budget=HALF, method=method)
    if error is RuntimeError:
        assert "(32, 16, 16) float32, (32,) int64" in caught.value.__notes__[0]
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


@pytest.mark.parametrize("method", ["obs", "l1"])
def test_single_samples_that_run_are_refused_all_the_same(method):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))
    with pytest.raises(ValueError, match=r"layer \d gets an input of shape .* without a batch dimension"):
        prune(model, X[:1], [X[0]], budget=HALF, method=method)


def test_one_pass_may_be_a_generator_and_two_may_not():
    shared = Refit("parallel", recalibrate=False)
    for refit, possible in ((None, True), (shared, True), ("batchnorm", False)):
        model, x = make_network("plain")
        pruner = OBSPruner(model, x, (b for b in class_loader(32)), budget=HALF)
        if possible:
            pruner.step(refit=refit)
        else:
            with pytest.raises(TypeError, match="only once"):
                pruner.step(refit=refit)


LOW = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


@LOW
@pytest.mark.parametrize("method", ["obs", "l1"])
def test_low_precision_is_pruned_as_it_is(method, dtype):
    model, x = make_network("residual")
    model, x = model.to(dtype), x.to(dtype)
    report = prune(model, x, class_loader(32), budget=HALF, method=method).report
    assert report.cost.macs <= 0.5 * report.dense.macs == 0.5 * count_ops(make_network("residual")[0], x.float())[0]
    assert {p.dtype for p in model.parameters()} == {dtype} and model(x).isfinite().all()


@LOW
def test_example_inputs_of_another_precision_are_named(dtype):
    model, x = make_network("residual")
    remedy = rf"example_inputs are float32 and the weights {str(dtype)[6:]}: pass example_inputs.to\({dtype}\)"
    with pytest.raises(TracingError, match=remedy):
        prune(model.to(dtype), x, class_loader(32), budget=HALF)
    with pytest.raises(RuntimeError, match=remedy):
        count_ops(model, x)


def in_place(model):
    model.compile()
    return model


def inside(model):
    model[0] = torch.compile(model[0])
    return model


@pytest.mark.parametrize(
    ("compiled", "remedy"),
    [
        (torch.compile, r"use model\._orig_mod"),
        (inside, r"use model\.0\._orig_mod"),
        (in_place, r"_compiled_call_impl = None"),
    ],
)
def test_compiled_networks_are_refused_by_everybody(compiled, remedy):
    model, x = make_network("plain")
    model, data = compiled(model), class_loader(32)
    for use in (
        lambda: prune(model, x, data, budget=HALF),
        lambda: BudgetPruner(model, x, importance=tp.importance.LAMPImportance(), budget=HALF),
        lambda: prunable_groups(model, x),
        lambda: count_ops(model, x),
        lambda: convert_to_resconv(model, x),
        lambda: ResConvPruner(model, x, budget=HALF),
        lambda: observe(model, data, []),
        lambda: recalibrate_batchnorm(model, data),
        lambda: refit_consumers(model, x, data, {}, refit="parallel"),
    ):
        with pytest.raises(TypeError, match=remedy):
            use()


# -- names


def test_old_and_new_names_mean_the_same():
    assert {"obs", "catro", "itpruner", "psap", "l1", "l2", "magnitude", "fpgm", "taylor", "random"} <= set(NAMES)
    for a, b in (
        ("l2", "magnitude"),
        ("l1", tp.importance.MagnitudeImportance(p=1)),
        ("random", RandomImportance(seed=0)),
    ):
        nets = []
        for method in (a, b):
            model, x = make_network("residual")
            prune(model, x, class_loader(32), budget=HALF, method=method)
            nets.append(weights(model))
        assert torch.equal(*nets)


@pytest.mark.parametrize("allocator", ["default", *ALLOCATORS])
@pytest.mark.parametrize("method", ["l1", "itpruner"])
def test_every_allocator_has_the_same_name_everywhere(allocator, method):
    model, x = make_network("residual")
    options = {"example_inputs": x, "loader": class_loader(32), "budget": HALF, "latency_seconds": None}
    metrics = prune_trial(model, {"method": method, "allocator": allocator}, evaluate=lambda m: 0.0, **options)
    report = prune(model, x, class_loader(32), budget=HALF, method=method, allocator=allocator).report
    assert metrics["macs"] == report.cost.macs <= 0.5 * report.dense.macs
    if (method, allocator) == ("itpruner", "program"):  # with its own weights, not with equal ones
        other, x = make_network("residual")
        by_default = prune(other, x, class_loader(32), budget=HALF, method=method).report
        assert by_default.rows == report.rows


@pytest.mark.parametrize(("name", "remedy"), [("resconv", "ResConvPruner"), ("psap_training", "PSAPPruner")])
def test_methods_that_choose_no_channels_are_named(name, remedy):
    model, x = make_network("plain")
    with pytest.raises(ValueError, match=f"method='{name}' is no criterion for channels: use {remedy}"):
        prune(model, x, class_loader(32), budget=HALF, method=name)


def test_what_is_registered_is_known_to_prune(monkeypatch):
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    monkeypatch.setattr(registry, "METHODS", registry._METHODS)
    register_method("lamp", tp.importance.LAMPImportance)
    model, x = make_network("plain")
    assert prune(model, x, class_loader(32), budget=HALF, method="lamp").report.criterion == "LAMPImportance"


def test_taylor_takes_the_gradients_of_the_samples_and_leaves_none():
    model, x = make_network("residual")
    twin, data = copy.deepcopy(model).eval(), class_loader(32)
    for images, labels in data:
        nn.functional.cross_entropy(twin(images), labels).backward()
    prune(model, x, data, budget=HALF, method="taylor")
    prune(twin, x, data, budget=HALF, method=tp.importance.TaylorImportance())
    assert torch.equal(weights(model), weights(twin))
    assert all(p.grad is None for p in model.parameters())


def test_gradients_come_back_if_there_are_no_labels():
    model, x = make_network("plain")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="gradients of the loss need labels"):
        prune(model, x, [X], budget=HALF, method="taylor")
    assert all(p.grad.eq(1).all() for p in model.parameters())


@pytest.mark.parametrize("method", ["l1", "l2", "fpgm", "random"])
def test_methods_that_look_at_weights_need_no_data(method):
    pruned = [make_network("plain")[0] for _ in range(2)]
    x = make_network("plain")[1]
    prune(pruned[0], x, budget=HALF, method=method, refit=None)
    prune(pruned[1], x, class_loader(32), budget=HALF, method=method, refit=None)
    for a, b in zip(pruned[0].state_dict().values(), pruned[1].state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "l2"}, "refit='sequential' needs images: pass a loader"),
        ({"method": "l2", "refit": "batchnorm"}, "refit='batchnorm' needs images"),
        ({"method": "obs", "refit": None}, "OBSImportance looks at data: pass loader="),
    ],
)
def test_what_needs_data_says_so(options, message):
    model, x = make_network("plain")
    before = Snapshot(model)
    with pytest.raises(ValueError, match=message):
        prune(model, x, budget=HALF, **options)
    before.check()
