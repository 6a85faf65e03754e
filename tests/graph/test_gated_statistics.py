"""Gates in front of norms over channels: statistics run over the channels whose gates are open."""

import copy
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode
from torch.utils.checkpoint import checkpoint

from helpers.norm_networks import NORM_NETWORKS, norm_network
from tp_importance import prunable_groups
from tp_importance.graph.gates import ChannelGates
from tp_importance.graph.kept_statistics import Kept, KeptStatistics, StatisticCall
from tp_importance.graph.surgery import remove_units
from tp_importance.graph.verify import sample_units


def closed(groups):
    removed = sample_units(groups)
    return removed, {g.name: np.isin(np.arange(g.n_units), removed[g.name]) for g in groups}


@pytest.fixture(params=sorted(NORM_NETWORKS))
def case(request):
    return norm_network(request.param, double=True)


@pytest.mark.parametrize("training", [False, True])
def test_closed_gates_are_removal(case, training):
    model, x, groups = case
    assert any(g.statistics for g in groups)
    removed, masks = closed(groups)
    model.train(training)
    dense, gates = model(x), ChannelGates(groups)
    gates.set(masks)
    masked = model(x)
    gates.watch(True)
    torch.testing.assert_close(model(x), masked, rtol=1e-12, atol=1e-12)
    gates.remove()
    assert torch.equal(model(x), dense) and not torch.allclose(masked, dense, atol=1e-3)
    remove_units(groups, removed)
    torch.testing.assert_close(model(x), masked, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("constant", [False, True])
def test_dimensions_of_heads(constant):
    """Products of queries and keys run over the dimensions that are kept, whether the scale is constant or not."""
    model, x, _ = norm_network("prenorm", double=True)
    for block in model.blocks:
        block.scale = block.dim**-0.5 if constant else None
    groups = prunable_groups(model, x, attention="dims")
    assert groups["blocks.0.qkv"].n_units == 4 and bool(groups["blocks.0.qkv"].queries) != constant
    removed, masks = closed(groups)
    gates = ChannelGates(groups)
    gates.set(masks)
    gates.watch(True)
    masked = model(x)
    masked.square().sum().backward()
    assert gates.take_gradient().isfinite().all()
    gates.remove()
    remove_units(groups, removed)
    torch.testing.assert_close(model(x), masked, rtol=1e-10, atol=1e-10)


def test_gradients_are_those_of_finite_differences(case):
    """Of open gates and of closed ones, where the statistics stay those of the open ones."""
    model, x, groups = case
    _, masks = closed(groups)
    gates = ChannelGates(groups)
    gates.values = gates.values.double()
    gates.set(masks)
    gates.watch(True)
    model(x).square().sum().backward()
    gradient, values = gates.take_gradient(), gates.values.detach()
    shut = torch.from_numpy(np.concatenate([masks[g.name] for g in groups]))
    for unit in torch.cat([shut.nonzero()[:12], (~shut).nonzero()[:4]]).flatten().tolist():
        loss = []
        for sign in (1, -1):
            gates.values = values.clone().requires_grad_()
            with torch.no_grad():
                gates.values[unit] += sign * 1e-6
            loss.append(float(model(x).square().sum().detach()))
        assert gradient[unit] == pytest.approx(
            (loss[0] - loss[1]) / 2e-6, rel=1e-5, abs=1e-7 * float(gradient.abs().max())
        )
    for group, part in zip(groups, gates.split(gradient.numpy()).values(), strict=True):
        assert np.all(part[masks[group.name]] != 0), "a closed gate feels what its unit would do, behind a norm, too"
    gates.remove()


def test_no_gradient_reaches_masked_filters(case):
    model, x, groups = case
    removed, masks = closed(groups)
    gates = ChannelGates(groups)
    gates.set(masks)
    model.train()(x).square().sum().backward()
    for group in groups:
        for m in group.producers:
            gradient = model.get_submodule(m.name).weight.grad
            assert not gradient[m.positions(removed[group.name])].any()
    gates.remove()


def grown(model, x):
    model.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


class Checkpointed(nn.Module):
    """Runs a module again in backward."""

    def __init__(self, module, reentrant):
        super().__init__()
        self.module, self.reentrant = module, reentrant

    def forward(self, x):
        return checkpoint(self.module, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["prenorm", "postnorm", "rms"])
def test_checkpointing(name, reentrant):
    """Blocks run again in backward, when the network does not run."""
    model, x, groups = norm_network(name, double=True)
    _, masks = closed(groups)
    gates = ChannelGates(groups)
    gates.set(masks)
    gates.watch(True)
    plain, felt = grown(model, x), gates.take_gradient()
    blocks = list(model.blocks)
    for i, block in enumerate(blocks):
        model.blocks[i] = Checkpointed(block, reentrant)
    found = grown(model, x)
    torch.testing.assert_close(gates.take_gradient(), felt)
    for i, block in enumerate(blocks):
        model.blocks[i] = block
    for key, value in plain.items():
        torch.testing.assert_close(found[re.sub(r"(blocks\.\d)", r"\1.module", key)], value)
    checkpoint(model, x, use_reentrant=False).square().mean().backward()
    torch.testing.assert_close(gates.take_gradient(), felt)
    assert _get_current_function_mode() is None
    gates.remove()


def test_a_checkpointed_function_that_takes_statistics_is_refused():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.often = nn.Linear(3, 8), nn.Linear(8, 2), False

        def norm(self, x):
            return x / x.norm(dim=-1, keepdim=True)

        def forward(self, x):
            x = self.a(x)
            return self.b(checkpoint(self.norm, x, use_reentrant=False) if self.often else self.norm(x))

    net, x = Net(), torch.randn(4, 3)
    groups = prunable_groups(net, x)
    gates = ChannelGates(groups)
    gates.set(closed(groups)[1])
    net(x).sum().backward()
    net.often = True
    with pytest.raises(RuntimeError, match="recomputation"):
        net(x).sum().backward()
    gates.remove()


def test_accumulation_autocast_and_half():
    model, x, groups = norm_network("prenorm")
    _, masks = closed(groups)
    gates = ChannelGates(groups)
    gates.set(masks)
    gates.watch(True)
    singles = []
    for batch in (x, 2 * x):
        model(batch).square().sum().backward()
        singles.append(gates.take_gradient())
    for batch in (x, 2 * x):
        model(batch).square().sum().backward()
    torch.testing.assert_close(gates.take_gradient(), singles[0] + singles[1])
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x).float().square().sum()
    loss.backward()
    assert F.cosine_similarity(gates.take_gradient(), singles[0], dim=0) > 0.99
    out = model.bfloat16()(x.bfloat16())
    assert out.dtype == torch.bfloat16
    gates.remove()


def test_no_hooks_and_no_mode_where_nothing_is_masked():
    model, x, groups = norm_network("prenorm")
    mlp = groups.exclude({g.name: "stays" for g in groups if g.statistics})
    gates = ChannelGates(mlp)
    assert len(mlp) and not any(m._forward_hooks for m in model.modules() if isinstance(m, nn.LayerNorm))
    gates.remove()
    gates, seen = ChannelGates(groups), []
    watched = model.norm.register_forward_pre_hook(lambda *_: seen.append(_get_current_function_mode()))
    model(x)
    gates.set(closed(groups)[1])
    model(x)
    gates.set({g.name: np.zeros(g.n_units, bool) for g in groups})
    model(x)
    assert [mode is None for mode in seen] == [True, False, True]
    watched.remove()
    gates.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_leaves_no_mode_behind(error):
    model, x, groups = norm_network("rms", double=True)
    gates = ChannelGates(groups)
    gates.set(closed(groups)[1])
    masked, twin = model(x), copy.deepcopy(model)
    assert torch.equal(twin(x), masked)
    norm = model.blocks[1].n1

    def fail(x):
        raise error

    norm.forward = fail
    with pytest.raises(error):
        model(x)
    del norm.forward
    assert torch.equal(model(x), masked)
    assert _get_current_function_mode() is None
    gates.remove()
    assert torch.equal(twin(x), model(x)) and not torch.equal(model(x), masked)


def test_raw_weights_that_read_masked_channels():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.w = nn.Linear(3, 8), nn.Linear(8, 2), nn.Parameter(torch.randn(2, 8))

        def forward(self, x):
            x = self.a(x).relu()
            return self.b(x) + F.linear(x, self.w)

    net, x = Net().double(), torch.randn(4, 3).double()
    groups = prunable_groups(net, x)
    removed, masks = closed(groups)
    gates = ChannelGates(groups)
    gates.set(masks)
    masked = net(x)
    masked.sum().backward()
    assert net.w.grad.any() and "w" not in vars(net)
    gates.remove()
    remove_units(groups, removed)
    torch.testing.assert_close(net(x), masked, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("module", "function", "axis", "groups"),
    [
        (nn.LayerNorm(8), "layer_norm", -1, 1),
        (nn.LayerNorm((8, 3, 5), elementwise_affine=False), "layer_norm", -3, 1),
        (nn.RMSNorm(8), "rms_norm", -1, 1),
        (nn.GroupNorm(2, 8), "group_norm", -3, 2),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norms_of_all_channels_by_the_kept_ones(module, function, axis, groups, dtype):
    module, x = module.to(dtype), torch.randn(6, 8, 3, 5, dtype=dtype)
    x = x if axis == -3 else x.movedim(1, -1)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_()
    call, net = StatisticCall("0", function, 0), nn.Sequential(module)
    kept = Kept(axis, torch.tensor([0, 2, 3, 5, 6, 7] if groups == 1 else [0, 1, 3, 4, 6, 7]), 8, groups)
    with KeptStatistics({call: kept}).running(net):
        zeroed = net(x)
    with KeptStatistics({call: kept}, others="norm").running(net):
        made = net(x)
    at = kept.channels
    torch.testing.assert_close(made.index_select(axis, at), zeroed.index_select(axis, at))
    assert not zeroed.index_select(axis, torch.tensor([4 if groups == 1 else 5])).any() and made.ne(0).all()
    everything = Kept(axis, torch.arange(8), 8, groups)
    with KeptStatistics({call: everything}, others="norm").running(net):
        torch.testing.assert_close(net(x), module(x))


def test_a_norm_group_that_goes_as_a_whole_keeps_its_own_statistics():
    net, x = nn.Sequential(nn.GroupNorm(4, 8)).double(), torch.randn(3, 8, 5).double()
    kept, dense = Kept(-2, torch.tensor([0, 1, 4]), 8, 2), net(x)
    with KeptStatistics({StatisticCall("0", "group_norm", 0): kept}, others="norm").running(net):
        made = net(x)
    torch.testing.assert_close(made[:, [0, 1, 2, 3, 6, 7]], dense[:, [0, 1, 2, 3, 6, 7]])
    assert not torch.allclose(made[:, 4:6], dense[:, 4:6], atol=0.1)


def test_a_copy_of_gates():
    _, _, groups = norm_network("prenorm")
    gates = ChannelGates(groups)
    copy.deepcopy(gates).remove()
    gates.remove()
