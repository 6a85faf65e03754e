import copy
import gc

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from tp_importance import prunable_groups
from tp_importance.graph.channel_axes import scale_inputs, scale_outputs
from tp_importance.graph.gates import ChannelGates
from tp_importance.graph.groups import PrunableGroups
from tp_importance.graph.masking import masked_units as gates
from tp_importance.graph.verify import sample_units
from tp_importance.testing import Snapshot, topology

NAMES = [
    *("plain", "residual", "concat", "dense", "depthwise", "grouped", "split", "flatten", "se", "shared_input"),
    *("transposed", "transformer_mlp", "padded_shortcut", "no_bn", "preact"),
]


def masks(groups: PrunableGroups, removed: dict[str, list[int]]) -> dict[str, np.ndarray]:
    return {g.name: np.isin(np.arange(g.n_units), removed[g.name]) for g in groups}


def parametrized(groups: PrunableGroups) -> None:
    """Weights that are computed, not stored: gates then act on the inputs."""
    for name in {m.name for g in groups for m in g.consumers}:
        module = groups.trace.model.get_submodule(name)
        if not isinstance(module, nn.ConvTranspose2d):
            parametrizations.weight_norm(module)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", [False, True])
def test_closed_gates_are_the_oracle_of_the_verification(name, training):
    case = topology(name).copy()
    removed = sample_units(case.groups)
    case.model.train(training)
    twin = copy.deepcopy(case.model)
    with gates(twin, case.groups, removed):
        masked = twin(case.x)
    dense = copy.deepcopy(case.model)(case.x)
    ours = ChannelGates(case.groups)
    ours.set(masks(case.groups, removed))
    out = case.model(case.x)
    torch.testing.assert_close(out, masked, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(out, dense, atol=1e-3)
    ours.remove()
    torch.testing.assert_close(case.model.eval()(case.x), dense if not training else case.model(case.x))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_gates_on_the_activations(name):
    """Over the weights and over the inputs: the same numbers; both against central differences in float64."""
    case = topology(name).copy()
    model, x = case.model.double(), case.x.double()
    closed = masks(case.groups, sample_units(case.groups))
    found = []
    for form in ("weights", "inputs"):
        if form == "inputs":
            parametrized(case.groups)
        bank = ChannelGates(case.groups)
        bank.values = bank.values.double()
        bank.set(closed)
        bank.watch(True)
        model(x).square().sum().backward()
        found.append(bank.take_gradient())
        assert bank.take_gradient() is None
        if form == "weights":
            values, eps = bank.values.detach(), 1e-6  # small: ReLU has kinks
            for unit in np.random.default_rng(0).choice(len(values) - 1, 6, replace=False):
                loss = []
                for sign in (1, -1):
                    bank.values = values.clone().requires_grad_()
                    with torch.no_grad():
                        bank.values[unit] += sign * eps
                    loss.append(float(model(x).square().sum().detach()))
                difference = (loss[0] - loss[1]) / (2 * eps)
                assert found[0][unit] == pytest.approx(difference, rel=1e-4, abs=1e-5 * float(found[0].abs().max()))
        bank.remove()
    assert found[0].abs().max() > 0
    torch.testing.assert_close(found[1], found[0], rtol=1e-8, atol=1e-8 * float(found[0].abs().max()))


def test_open_gates_change_nothing_at_all():
    case = topology("residual").copy()
    case.model.train()
    twin, results = copy.deepcopy(case.model), []
    bank = ChannelGates(case.groups)
    for model in (case.model, twin):
        loss = model(case.x).square().sum()
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    bank.watch(True)
    case.model.zero_grad()
    case.model(case.x)
    bank.remove()


def test_no_gradient_reaches_masked_filters():
    case = topology("residual").copy()
    bank = ChannelGates(case.groups)
    removed = sample_units(case.groups)
    bank.set(masks(case.groups, removed))
    case.model.train()(case.x).square().sum().backward()
    for group in case.groups:
        for m in group.members:
            module, gone = case.model.get_submodule(m.name), m.positions(removed[group.name])
            gradient = module.weight.grad if m.role == "out" else module.weight.grad.transpose(0, 1)
            assert not gradient[gone].any() and gradient[m.positions(set(m.units) - set(removed[group.name]))].any()
    bank.remove()


def test_leaves_no_trace():
    case = topology("residual").copy()
    snapshot = Snapshot(case.model)
    bank = ChannelGates(case.groups)
    bank.set(masks(case.groups, sample_units(case.groups)))
    assert case.model.state_dict().keys() == snapshot.values.keys()
    with torch.no_grad():
        case.model(case.x)
        with pytest.raises(RuntimeError):
            case.model(case.x[:, :2])  # a layer that raises has its weight back
    assert all("weight" not in vars(m) for m in case.model.modules())
    clone = copy.deepcopy(case.model)
    torch.testing.assert_close(clone(case.x), case.model(case.x))  # a copy shares the gates
    bank.remove()
    snapshot.check()
    torch.testing.assert_close(clone(case.x), case.model(case.x))  # and is free with them


def test_accumulation_checkpointing_and_layouts():
    case = topology("grouped").copy()
    bank = ChannelGates(case.groups)
    bank.set(masks(case.groups, sample_units(case.groups)))
    bank.watch(True)
    xs = [case.x, case.x.flip(0) * 2]
    for x in xs:
        case.model(x).sum().backward()
    both = bank.take_gradient()
    singles = []
    for x in xs:
        case.model(x).sum().backward()
        singles.append(bank.take_gradient())
    torch.testing.assert_close(both, singles[0] + singles[1])
    checkpoint(case.model, case.x, use_reentrant=False).sum().backward()
    torch.testing.assert_close(bank.take_gradient(), singles[0])
    case.model.to(memory_format=torch.channels_last)
    case.model(case.x.to(memory_format=torch.channels_last)).sum().backward()
    torch.testing.assert_close(bank.take_gradient(), singles[0], rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        loss = case.model(case.x).float().sum()
    loss.backward()
    half = bank.take_gradient()
    assert half.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(half, singles[0], dim=0) > 0.99
    bank.remove()


def test_half_precision_weights():
    case = topology("residual").copy()
    case.model.bfloat16()
    bank = ChannelGates(case.groups)
    bank.set(masks(case.groups, sample_units(case.groups)))
    bank.watch(True)
    out = case.model(case.x.bfloat16())
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert torch.isfinite(bank.take_gradient()).all()
    bank.remove()


def test_nothing_grows():
    case = topology("residual").copy()
    bank = ChannelGates(case.groups)
    bank.watch(True)

    def alive(steps):
        for _ in range(steps):
            case.model(case.x).sum().backward()
            bank.take_gradient()
        gc.collect()
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    assert alive(3) == alive(30)
    bank.remove()


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_factors_over_weights(groups, transposed):
    """Scaling inputs or outputs of a convolution is scaling its weight."""
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    conv = kind(8, 12, 3, groups=groups, bias=False).double()
    x, a, b = torch.randn(2, 8, 5, 5).double(), torch.rand(8).double(), torch.rand(12).double()
    expected = conv(x * a.view(-1, 1, 1)) * b.view(-1, 1, 1)
    with torch.no_grad():
        conv.weight.mul_(scale_inputs(conv, a)).mul_(scale_outputs(conv, b))
    torch.testing.assert_close(conv(x), expected)


def test_groups_under_gates_are_the_same_and_closed_gates_hold_them():
    case = topology("residual").copy()
    held = ChannelGates(case.groups)
    assert prunable_groups(case.model, case.x).names == case.groups.names
    held.set(masks(case.groups, sample_units(case.groups)))
    groups = prunable_groups(case.model, case.x)
    excluded = {e.name: e for e in groups.excluded if e.kind != "output"}
    assert not groups.names and set(excluded) == set(case.groups.names)
    assert all(e.kind == "pinned" and "its channels meet values" in e.reason for e in excluded.values())
    held.remove()
    assert prunable_groups(case.model, case.x).names == case.groups.names
