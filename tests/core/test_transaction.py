import copy

import pytest
import torch
import torch_pruning as tp
from torch import nn

from tp_importance import prunable_groups
from tp_importance.core.guards import preserved, transaction
from tp_importance.graph.surgery import remove_units
from tp_importance.graph.verify import sample_units
from tp_importance.testing import TOPOLOGIES, Snapshot, make_network


class Stop(Exception):
    pass


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_surgery_that_stops_half_way_is_undone(name):
    model, x = make_network(name)
    model.train()
    next(model.parameters()).requires_grad_(False)
    groups = prunable_groups(model, x, verify=False)
    output, snapshot = model.eval()(x), Snapshot(model.train())
    removed = sample_units(groups)
    for stop_after in range(len(removed)):
        names = list(removed)[: stop_after + 1]
        fresh = prunable_groups(model, x, verify=False)
        with pytest.raises(Stop), transaction(model):
            remove_units(fresh, {n: removed[n] for n in names})
            assert any(a.shape != b.shape for a, b in zip(model.parameters(), snapshot.values.values(), strict=False))
            raise Stop
        snapshot.check()
    with torch.no_grad():
        assert torch.equal(model.eval()(x), output)
    remove_units(prunable_groups(model, x, verify=False), removed)  # nothing is left that would be in the way


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt, SystemExit])
def test_every_exception_counts_and_passes_unchanged(error):
    model, x = make_network("residual")
    snapshot = Snapshot(model)
    raised = error("now")
    with pytest.raises(error) as caught, transaction(model) as same:
        assert same is model
        graph = tp.DependencyGraph().build_dependency(model, x)
        group = graph.get_pruning_group(model[0][0], tp.prune_conv_out_channels, [0, 3])
        for i, (dep, idxs) in enumerate(group):  # by hand, so that it stops between two layers
            if i == 3:
                raise raised
            dep(idxs)
    assert caught.value is raised
    snapshot.check()


def test_what_is_undone():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU())
    model[1].note = "mine"
    model.register_buffer("table", torch.arange(3))
    snapshot, layers, note = Snapshot(model), list(model), model[1].note
    with pytest.raises(Stop), transaction(model):
        model[0].weight = nn.Parameter(model[0].weight[:2])
        model[0].out_features = 2
        model[1].running_mean = model[1].running_mean[:2]
        model[1].note = "other"
        model[1].extra = 1
        del model[1].num_batches_tracked
        model[2] = nn.Sigmoid()
        model.append(nn.Linear(2, 2))
        model.register_buffer("more", torch.zeros(1))
        model.table = None
        model.eval()
        model[0].register_forward_hook(lambda *_: None)
        model[0].register_parameter("bias", None)
        raise Stop
    snapshot.check()
    assert list(model) == layers and model[1].note == note and not hasattr(model[1], "extra")
    assert list(model.state_dict()) == list(snapshot.values)
    model(torch.randn(5, 4))


def test_success_keeps_the_changes():
    model, x = make_network("residual")
    groups = prunable_groups(model, x, verify=False)
    with transaction(model):
        remove_units(groups, {"0.0": [1]})
    assert model[0][0].out_channels == 7 and model(x).shape == (2, 4)


def test_optimizer_still_holds_the_parameters():
    model, x = make_network("residual")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    groups = prunable_groups(model, x, verify=False)
    with pytest.raises(Stop), transaction(model):
        remove_units(groups, sample_units(groups))
        raise Stop
    before = copy.deepcopy(model.state_dict())
    model(x).square().sum().backward()
    optimizer.step()
    assert all(
        not torch.equal(p, before[n]) for n, p in model.named_parameters() if p.grad is not None and p.grad.any()
    )


def test_shared_modules_and_tied_weights_stay_shared():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(4, 4))
    model[3].weight = shared.weight
    with pytest.raises(Stop), transaction(model):
        model[0].weight = nn.Parameter(torch.zeros(2, 4))
        raise Stop
    assert model[0] is model[2] and model[3].weight is model[0].weight


def test_nested_and_within_preserved():
    model = nn.Sequential(nn.Linear(4, 3)).train()
    snapshot = Snapshot(model)
    with transaction(model):
        with pytest.raises(Stop), transaction(model), preserved(model):
            model.eval()
            model[0].weight = nn.Parameter(torch.zeros(2, 4), requires_grad=False)
            raise Stop
        snapshot.check()
        model[0].bias = None
    assert model[0].bias is None and model[0].out_features == 3


def test_handles_of_hooks_still_work_after_a_rollback():
    net, calls = nn.Linear(2, 2), []
    handles = [
        net.register_forward_hook(lambda *_: calls.append("after")),
        net.register_forward_pre_hook(lambda *_: calls.append("before")),
        net.register_full_backward_hook(lambda *_: calls.append("backward")),
    ]
    with pytest.raises(Stop), transaction(net):
        net.weight = nn.Parameter(net.weight[:1])
        net.register_forward_hook(lambda *_: calls.append("new"))
        raise Stop
    net(torch.zeros(1, 2, requires_grad=True)).sum().backward()
    assert sorted(calls) == ["after", "backward", "before"]
    for handle in handles:
        handle.remove()
    net(torch.zeros(1, 2))
    assert len(calls) == 3 and not net._forward_hooks
