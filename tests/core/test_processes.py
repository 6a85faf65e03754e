"""Networks that belong to a wrapper, and calls that each of several processes makes for itself."""

import copy
import warnings
from contextlib import contextmanager
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch_pruning as tp
from torch import nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.testing._internal.distributed.fake_pg import FakeStore

from tp_importance import (
    Budget,
    BudgetPruner,
    CATROPruner,
    Distiller,
    LatencyTable,
    OBSImportance,
    PSAPPruner,
    Refit,
    ResConvPruner,
    convert_to_resconv,
    count_ops,
    fuse,
    measure_latency,
    prunable_groups,
    prune,
    recalibrate_batchnorm,
    refitted_step,
    slice_classifier,
)
from tp_importance.automl import BudgetProblem, prune_trial
from tp_importance.latency.measure import Latency
from tp_importance.methods.resconv import remove_layers
from tp_importance.refitting.refit import refit_consumers
from tp_importance.statistics.observe import observe
from tp_importance.testing import class_loader, make_network

HALF = Budget(macs=0.5)
X, DATA = make_network("plain")[1], class_loader(32)
L1 = partial(tp.importance.MagnitudeImportance, p=1)

USES = {
    "prune": lambda m: prune(m, X, DATA, budget=HALF),
    "BudgetPruner": lambda m: BudgetPruner(m, X, importance=L1(), budget=HALF),
    "CATROPruner": lambda m: CATROPruner(m, X, DATA, budget=HALF),
    "PSAPPruner": lambda m: PSAPPruner(m, X, budget=HALF),
    "ResConvPruner": lambda m: ResConvPruner(m, X, budget=HALF),
    "convert_to_resconv": lambda m: convert_to_resconv(m, X),
    "fuse": fuse,
    "remove_layers": lambda m: remove_layers(m, X, ["0"]),
    "prunable_groups": lambda m: prunable_groups(m, X),
    "collect": lambda m: OBSImportance().collect(m, X, DATA),
    "observe": lambda m: observe(m, DATA, []),
    "recalibrate_batchnorm": lambda m: recalibrate_batchnorm(m, DATA),
    "refit": lambda m: refit_consumers(m, X, DATA, {}, refit="parallel"),
    "Distiller": Distiller,
    "watching": lambda m: Distiller(nn.Linear(2, 2)).watching(m).__enter__(),
    "measure_latency": lambda m: measure_latency(m, X, min_run_time=0.001),
    "count_ops": lambda m: count_ops(m, X),
    "slice_classifier": lambda m: slice_classifier(m, [0, 1]),
    "prune_trial": lambda m: prune_trial(m, {"method": "l1"}, example_inputs=X, evaluate=lambda m: 0.0, budget=HALF),
    "BudgetProblem": lambda m: BudgetProblem.prepare(m, X, DATA, budget=HALF),
}


@contextmanager
def group(backend="gloo", store=None, size=1):
    dist.init_process_group(backend, store=store or dist.HashStore(), rank=0, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.fixture
def alone():
    with group():
        yield


@pytest.fixture
def two_processes():
    with group("fake", FakeStore(), 2):  # torch.distributed as it is in the first of two processes
        yield


def inside(wrap):
    def make(model):
        model[1] = wrap(model[1])
        return model

    return make


def as_dtensor(model):
    mesh = init_device_mesh("cpu", (1,))
    conv = model[1][0]
    conv.weight = nn.Parameter(DTensor.from_local(conv.weight.detach(), mesh, [Replicate()]))
    return model


def sharded(model):
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    return model


def fsdp(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that one process has nothing to shard
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


class Subclassed(DistributedDataParallel):
    """As frameworks have them."""


@pytest.mark.parametrize(
    ("wrap", "said"),
    [
        (nn.DataParallel, r"model is wrapped in DataParallel, .* give model\.module, and wrap it again after"),
        (DistributedDataParallel, r"model is wrapped in DistributedDataParallel, which exchanges.*give model\.module"),
        (Subclassed, r"model is wrapped in Subclassed, which exchanges gradients.*give model\.module"),
        (AveragedModel, r"model is wrapped in AveragedModel, which averages.*give model\.module"),
        (fsdp, r"model is wrapped in FullyShardedDataParallel, .*give model\.module"),
        (sharded, r"model was given to fully_shard, .*prune the network first.*call fully_shard afterwards"),
        (replicate, r"model was given to replicate, .*call replicate afterwards"),
        (inside(nn.DataParallel), r"model\.1 is wrapped in DataParallel, .*give model\.1\.module"),
        (inside(DistributedDataParallel), r"model\.1 is wrapped in DistributedDataParallel"),
        (as_dtensor, r"model\.1\.0\.weight is a DTensor.*shard it afterwards"),
    ],
)
def test_wrapped_networks_are_refused(alone, wrap, said):
    model = wrap(make_network("plain")[0])
    before = {n: p for n, p in model.named_parameters()}
    for use in (USES["prune"], USES["prunable_groups"]):
        with pytest.raises(TypeError, match=said):
            use(model)
    assert all(p is before[n] for n, p in model.named_parameters())


@pytest.mark.parametrize("name", USES)
def test_by_everybody(alone, name):
    model = DistributedDataParallel(make_network("plain")[0])
    with pytest.raises(TypeError, match=r"is wrapped in DistributedDataParallel.*give \w+\.module"):
        USES[name](model)
    assert model.module[0][0].out_channels == 8


def test_in_a_pruner_of_torch_pruning():
    model = nn.DataParallel(make_network("plain")[0])
    pruner = tp.pruner.BasePruner(model, X, L1(), pruning_ratio=0.5, ignored_layers=[model.module[3][2]])
    with pytest.raises(TypeError, match=r"pruner\.model is wrapped in DataParallel.*give pruner\.model\.module"):
        refitted_step(pruner, X, DATA, refit=Refit("parallel", recalibrate=False))
    assert model.module[0][0].out_channels == 8


def test_by_the_plugins_of_nni():
    pytest.importorskip("nni")
    import nni_plugins

    config = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
    model = nn.DataParallel(make_network("plain")[0])
    masks = {"module.0.0": {"weight": torch.ones(8, 1, 1, 1)}}
    for use in (
        lambda: nni_plugins.CATROPruner(model, config, loader=DATA),
        lambda: nni_plugins.OBSPruner(model, config, loader=DATA),
        lambda: nni_plugins.ITPruner(model, config, loader=DATA),
        lambda: nni_plugins.PSAPPruner(model, config, None, budget=HALF, example_inputs=X),
        lambda: nni_plugins.ResConvPruner(model, config, None, budget=HALF, example_inputs=X),
        lambda: nni_plugins.refit_masks(model, masks, DATA, X, refit="parallel"),
        lambda: nni_plugins.speedup(model, X, masks),
    ):
        with pytest.raises(TypeError, match=r"model is wrapped in DataParallel.*give model\.module"):
            use()


def test_what_is_inside_is_pruned_and_wrapped_again(alone):
    model = DistributedDataParallel(make_network("plain")[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one process needs no warning
        prune(model.module, X, DATA, budget=HALF)
    again = DistributedDataParallel(model.module)
    again(DATA[0][0]).sum().backward()
    assert all(p.grad is not None for p in again.parameters())


def test_an_attribute_called_module_is_no_wrapper():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = make_network("plain")[0]

        def forward(self, x):
            return self.module(x)

    assert prune(Holder(), X, DATA, budget=HALF).report.cost.macs > 0


# -- several processes


def one_millisecond(model, x, **_):
    return Latency(1.0, 0.0, 1, 1, "fake", 1)


WARNS = {
    "prune": lambda m: prune(m, X, DATA, budget=HALF),
    "prune in parallel": lambda m: prune(m, X, DATA, budget=HALF, refit="parallel"),
    "prune by gradients": lambda m: prune(m, X, DATA, budget=HALF, method="taylor"),
    "step": lambda m: CATROPruner(m, X, DATA, budget=HALF).step(refit="sequential"),
    "plan": lambda m: CATROPruner(m, X, DATA, budget=HALF).plan(),
    "collect": lambda m: OBSImportance().collect(m, X, DATA),
    "observe": lambda m: observe(m, DATA, []),
    "recalibrate_batchnorm": lambda m: recalibrate_batchnorm(m, DATA),
    "refit": lambda m: refit_consumers(
        m, X, DATA, {"0.0": [1]}, Refit("sequential", memory_limit=1, recalibrate=False)
    ),
    "latency": lambda m: BudgetPruner(
        m, X, importance=L1(), budget=Budget(latency=0.9), latency_table=LatencyTable(measure=one_millisecond)
    ).measure_latency(),
    "layers": lambda m: ResConvPruner(m, X, DATA, budget=Budget(macs=0.9), importance="output").step(),
    "prune_trial": lambda m: prune_trial(
        m, {"method": "catro"}, example_inputs=X, evaluate=lambda m: 0.0, loader=DATA, budget=HALF
    ),
}


@pytest.mark.parametrize("name", WARNS)
def test_several_processes_are_warned_once_per_call(two_processes, name):
    model = make_network("residual" if name == "layers" else "plain")[0]
    if name == "layers":
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), model[3])
        model[4][2] = nn.Linear(8, 4)
    twin = copy.deepcopy(model)
    for each in (model, twin):  # and in the next call again
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            WARNS[name](each)
        mine = [w for w in found if "torch.distributed runs 2 processes" in str(w.message)]
        assert len(mine) == 1 and mine[0].category is UserWarning and mine[0].filename == __file__
        assert "one process before the network is wrapped" in str(mine[0].message)
        assert "every process the same batches" in str(mine[0].message)


def test_what_looks_at_no_data_is_not_warned_of(two_processes):
    model = make_network("plain")[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BudgetPruner(model, X, importance=L1(), budget=HALF).step()
