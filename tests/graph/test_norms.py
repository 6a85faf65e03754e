"""Per-channel maps beside batch norm: frozen batch norms, instance norms; and local response norms, which are none."""

import copy
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import nn
from torchvision.models import resnet18
from torchvision.ops import FrozenBatchNorm2d

from helpers.group_cases import reasons, removal
from helpers.states import state
from tp_importance import (
    Budget,
    BudgetPruner,
    CATROImportance,
    OBSImportance,
    PSAPPruner,
    Refit,
    channel_pruners,
    count_ops,
    load_pruned,
    prunable_groups,
    prune,
    refitted_step,
    save_pruned,
)
from tp_importance.graph.layer_pruners import FrozenNormPruner, is_frozen_norm
from tp_importance.graph.surgery import remove_units
from tp_importance.graph.verify import masked_equals_removed
from tp_importance.testing import TOPOLOGIES, Snapshot, class_loader, loader_for, make_network, topology
from tp_importance.testing.networks import head

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(5))
WITH_BATCH_NORM = [
    name for name in TOPOLOGIES if name not in ("no_bn", "flatten", "transformer_mlp", "padded_shortcut")
]
STATE = ("weight", "bias", "running_mean", "running_var")


def frozen_twin(model):
    """A copy in which frozen batch norms compute what the batch norms did."""
    twin = copy.deepcopy(model)
    for name, norm in list(twin.named_modules()):
        if isinstance(norm, nn.BatchNorm2d):
            new = FrozenBatchNorm2d(norm.num_features, norm.eps)
            for key in STATE:
                getattr(new, key).copy_(getattr(norm, key).detach())
            parent, _, leaf = name.rpartition(".")
            setattr(twin.get_submodule(parent), leaf, new)
    return twin


def frozen_resnet():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = resnet18(norm_layer=FrozenBatchNorm2d, weights=None, num_classes=4)
        for norm in model.modules():
            if isinstance(norm, FrozenBatchNorm2d):
                for key, low in zip(STATE, (0.5, -0.5, -0.5, 0.5), strict=True):
                    getattr(norm, key).copy_(torch.rand(norm.weight.shape) + low)
    return model


def between(norm, act=nn.ReLU, c_in=3, conv=nn.Conv2d):
    return nn.Sequential(conv(c_in, 10, 3, bias=False), norm, act(), conv(10, 6, 3), nn.ReLU(), conv(6, 4, 1)).eval()


def test_what_is_a_frozen_batch_norm():
    class Mine(nn.Module):
        def __init__(self, **sizes):
            super().__init__()
            for key in STATE:
                self.register_buffer(key, torch.ones(sizes.get(key, 4)))

    assert is_frozen_norm(FrozenBatchNorm2d(4)) and is_frozen_norm(Mine())
    assert not is_frozen_norm(nn.BatchNorm2d(4)) and not is_frozen_norm(nn.InstanceNorm2d(4, affine=True))
    assert not is_frozen_norm(Mine(bias=(1, 4, 1, 1))) and not is_frozen_norm(Mine(bias=5))
    trained = Mine()
    trained.gain = nn.Parameter(torch.ones(4))
    assert not is_frozen_norm(trained)


@pytest.mark.parametrize("name", WITH_BATCH_NORM)
def test_frozen_batch_norms_are_pruned_like_batch_norms(name):
    case = topology(name)
    frozen = prunable_groups(frozen_twin(case.model), case.x)
    assert [(g.name, g.width, [(m.name, m.role) for m in g.members]) for g in frozen] == [
        (g.name, g.width, [(m.name, m.role) for m in g.members]) for g in case.groups
    ]
    assert [e.name for e in frozen.excluded] == [e.name for e in case.groups.excluded]
    removed = removal(case.groups, 0)
    assert masked_equals_removed(frozen, case.x, removed) is None
    pruned = case.copy()
    remove_units(frozen, removed)
    remove_units(pruned.groups, removed)
    torch.testing.assert_close(frozen.trace.model(case.x), pruned.model(case.x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("importance", [OBSImportance, CATROImportance])
@pytest.mark.parametrize("mode", ["parallel", "sequential"])
def test_values_and_refits_are_those_of_batch_norms(importance, mode):
    model, x = make_network("residual")
    twin, data = frozen_twin(model), loader_for(x)
    outputs, refit = [], Refit(mode, recalibrate=False)  # a frozen norm would not follow
    for network in (model, twin):
        report = BudgetPruner(network, x, data, budget=Budget(macs=0.5), importance=importance()).step(refit=refit)
        outputs.append(network.eval()(x))
        assert not any(row.skipped for row in report.refit.rows)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["obs", "catro", "taylor", "itpruner", "psap", "l1"])
def test_one_call_meets_the_budget(method):
    model, x = make_network("residual")
    frozen = frozen_twin(model)
    dense, _ = count_ops(frozen, x)
    prune(frozen, x, loader_for(x), budget=Budget(macs=0.5), method=method)
    assert 0.4 * dense < count_ops(frozen, x)[0] <= 0.5 * dense
    assert torch.isfinite(frozen.eval()(x)).all()


def test_detector_backbone_round_trip(tmp_path):
    model, x = frozen_resnet(), torch.randn(1, 3, 64, 64)
    pruner = BudgetPruner(model, x, importance=tp.importance.MagnitudeImportance(), budget=Budget(macs=0.5))
    assert len(pruner.groups) == 12 and [e.name for e in pruner.groups.excluded] == ["fc"]
    pruner.step()
    assert len(model.bn1.running_var) == model.conv1.out_channels < 64
    save_pruned(model, tmp_path / "pruned.pt")
    again = load_pruned(frozen_resnet, tmp_path / "pruned.pt")
    assert torch.equal(again(x), model.eval()(x))


def test_pruning_while_training_takes_frozen_norms_along():
    model, x = make_network("residual")
    model = frozen_twin(model)
    data = class_loader(32)
    pruner = PSAPPruner(model, x, budget=Budget(macs=0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    pruner.start(optimizer, total_steps=12)
    model.train()
    for images, labels in data * 6:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        pruner.step()
    dense = pruner.dense.macs
    pruner.finish()
    assert count_ops(model, x)[0] <= 0.5 * dense


class Follower(nn.Module):
    """`conv`, `between`, a frozen batch norm."""

    def __init__(self, between, norm):
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv2d(3, 6, 3), norm, nn.Conv2d(6, 4, 3)
        self.between = between

    def forward(self, x):
        return self.out(self.norm(self.between(self.conv(x))))


class Active(FrozenBatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


@pytest.mark.parametrize(
    ("step", "norm", "found"),
    [
        (lambda x: x, FrozenBatchNorm2d, True),
        (lambda x: x * 2.0, FrozenBatchNorm2d, False),
        (F.relu, FrozenBatchNorm2d, False),
        (lambda x: x, Active, False),
    ],
)
def test_only_the_affine_map_right_behind_a_layer_is_its_norm(step, norm, found):
    model = Follower(step, norm(6))
    groups = prunable_groups(model, X)
    assert groups.names == ["conv"]
    assert groups.trace.batch_norm_behind("conv") is (model.norm if found else None)


# --- instance norms ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tracks", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_instance_norms_are_per_channel(dims, affine, tracks):
    norm = getattr(nn, f"InstanceNorm{dims}d")(10, affine=affine, track_running_stats=tracks)
    with torch.no_grad():
        for tensor in norm.state_dict().values():
            if tensor.dim():
                tensor.copy_(torch.rand(10, generator=torch.Generator().manual_seed(len(tensor))) + 0.5)
    model = between(norm, conv=getattr(nn, f"Conv{dims}d"))
    x = torch.randn(2, 3, *[8] * dims)
    before = state(norm)
    groups = prunable_groups(model, x)
    assert groups.names == ["0", "3"]
    removed = {"0": [1, 4, 5], "3": [0]}
    assert masked_equals_removed(groups, x, removed) is None
    remove_units(groups, removed)
    keep = np.setdiff1d(np.arange(10), [1, 4, 5])
    assert norm.num_features == 7
    for key, tensor in norm.state_dict().items():
        assert torch.equal(tensor, before[key][keep] if before[key].dim() else before[key]), key


def test_an_instance_norm_may_lie_about_features_it_does_not_use():
    model = between(nn.InstanceNorm2d(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says so, too
        report = BudgetPruner(model, X, [X], importance=OBSImportance(), budget=Budget(macs=0.6)).step()
        assert model(X).shape == (2, 4, 8, 8)
    assert report.rows and model[0].out_channels < 10


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.SyncBatchNorm, nn.InstanceNorm2d, nn.PReLU, FrozenBatchNorm2d])
def test_all_per_channel_maps_pass_through(norm):
    assert prunable_groups(between(norm(10)), X).names == ["0", "3"]


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}])
def test_batch_norms_without_a_part_pass_through(options):
    assert prunable_groups(between(nn.BatchNorm2d(10, **options)), X).names == ["0", "3"]


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [nn.LocalResponseNorm(3), nn.CrossMapLRN2d(3)])
def test_local_response_norms_look_at_neighbours(norm):
    found = reasons(between(norm), X)
    found = {name.split("/")[0]: reason for name, reason in found.items()}
    assert found["0"].startswith(f"1 ({type(norm).__name__}, ") and "mixes its channels" in found["0"]
    assert "3" not in found


def test_local_response_norm_as_a_function():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Conv2d(6, 4, 3)

        def forward(self, x):
            return self.c(F.relu(self.b(F.local_response_norm(self.a(x), 3))))

    found = reasons(Net(), 10 * X)
    assert found["a"] == "Net (local_response_norm) mixes its channels" and "b" not in found


@pytest.mark.parametrize("layer", [nn.LazyBatchNorm2d(), nn.LazyInstanceNorm2d(affine=True)])
def test_lazy_layers_must_have_run(layer):
    model = between(layer)
    with pytest.raises(TypeError, match=r"1\.weight of the lazy .* has no shape yet: run the model once"):
        prunable_groups(model, X)
    model(X)
    assert prunable_groups(model, X).names == ["0", "3"]


# --- hosts' and users' own --------------------------------------------------------------------------------------------


class Wrong(FrozenNormPruner):
    """Cuts the first channels, whatever it is asked for."""

    def prune_out_channels(self, layer, idxs):
        return super().prune_out_channels(layer, range(len(idxs)))

    prune_in_channels = prune_out_channels


def test_the_users_pruning_functions_win_and_are_verified():
    model = frozen_twin(make_network("plain")[0])
    mine = Wrong()
    assert channel_pruners(model, {FrozenBatchNorm2d: mine}) == {FrozenBatchNorm2d: mine}
    found = reasons(model, make_network("plain")[1], customized_pruners={FrozenBatchNorm2d: mine})
    assert all("removal is not masking" in found[name] for name in ("0.0", "1.0", "2.0"))


@pytest.mark.parametrize("norm", [FrozenBatchNorm2d(10), nn.InstanceNorm2d(10, track_running_stats=True)])
def test_hosts_pruner_needs_our_functions(norm):
    model = nn.Sequential(*between(norm)[:5], head(6)).eval()
    data, options = [torch.randn(16, 3, 12, 12)], {"pruning_ratio": 0.5, "ignored_layers": [model[5][2]]}
    snapshot, importance = Snapshot(model), tp.importance.MagnitudeImportance()
    with pytest.raises(RuntimeError, match=rf"{type(norm).__name__} by itself: .*channel_pruners"):
        refitted_step(
            tp.pruner.BasePruner(model, X, importance, **options), X, data, refit=Refit("parallel", recalibrate=False)
        )
    snapshot.check()
    pruner = tp.pruner.BasePruner(model, X, importance, customized_pruners=channel_pruners(model), **options)
    report = refitted_step(pruner, X, data, refit=Refit("parallel", recalibrate=False))
    assert [row.name for row in report.rows if not row.skipped] == ["3", "5.2"]
    assert model[0].out_channels == len(norm.running_mean) == 5
