"""Layers whose weight is computed: weight norm, spectral norm, masks, parametrizations."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import nn
from torch.nn.utils import parametrizations, parametrize, spectral_norm, weight_norm
from torch.nn.utils import prune as masks

from helpers.group_cases import reasons, removal
from tp_importance import (
    Budget,
    BudgetPruner,
    Distiller,
    PSAPPruner,
    Refit,
    ResConvPruner,
    channel_pruners,
    convert_to_resconv,
    count_ops,
    load_pruned,
    prunable_groups,
    prune,
    recalibrate_batchnorm,
    refitted_step,
    save_pruned,
)
from tp_importance.core.copies import copied
from tp_importance.graph.reparametrised import computed_tensors, follows
from tp_importance.graph.surgery import remove_units
from tp_importance.graph.verify import masked_equals_removed
from tp_importance.testing import Snapshot, class_loader
from tp_importance.testing.networks import conv_bn_relu, head

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))
DATA = class_loader(32)
BUDGET = Budget(macs=0.75)


class Centred(nn.Module):
    """Weight standardisation without its scale: over the inputs of every filter."""

    def forward(self, weight):
        return weight - weight.mean((1, 2, 3), keepdim=True)


class Fixed(nn.Module):
    """Holds back some weights for good, as a mask or a quantisation would."""

    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight):
        return weight * self.mask


def with_mask(layer):
    generator = torch.Generator().manual_seed(1)
    parametrize.register_parametrization(layer, "weight", Fixed(torch.rand(layer.weight.shape, generator=generator)))


def centred(layer):
    parametrize.register_parametrization(layer, "weight", Centred())


OLD = {
    "weight_norm": weight_norm,
    "weight_norm over all": lambda layer: weight_norm(layer, dim=None),
    "spectral_norm": spectral_norm,
    "mask": lambda layer: masks.l1_unstructured(layer, "weight", 0.5),
    "masks": lambda layer: masks.ln_structured(masks.random_unstructured(layer, "weight", 0.2), "weight", 0.3, 2, 0),
}
BY_FILTER = {"new weight_norm": parametrizations.weight_norm, "standardised": centred}
BY_WEIGHT = {"new mask": with_mask}
MIXED = {
    "new spectral_norm": parametrizations.spectral_norm,
    "new weight_norm over all": lambda layer: parametrizations.weight_norm(layer, dim=None),
}
ALL = OLD | BY_FILTER | BY_WEIGHT | MIXED


def network(change=None, layer="2.0"):
    """Four groups, named like their convolutions; `change` is done to one of these, which reads the group before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(*(conv_bn_relu(a, b) for a, b in ((3, 8), (8, 12), (12, 10), (10, 8))), head(8))
        if change is not None:
            change(model.get_submodule(layer))
    return model.eval()


def plain_twin(model):
    """A copy in which every computed weight is a parameter, by the remedies that the reasons give."""
    twin = copied(model)
    for name, module in twin.named_modules():
        for what in computed_tensors(module):
            exec(what.reason(name).partition(": ")[2], {"torch": torch, "model": twin})
    return twin


@pytest.mark.parametrize("kind", ALL)
def test_what_it_is_and_how_to_remove_it(kind):
    model = network(ALL[kind])
    snapshot, before = Snapshot(model), model(X).detach()
    found = reasons(model, X)
    snapshot.check()
    if kind in BY_WEIGHT:
        assert found.keys() == {"4.2"}
        return
    touched = {"1.0"} if kind in BY_FILTER else {"1.0", "2.0"}
    assert found.keys() == {*touched, "4.2"}
    assert all(
        "2.0.weight is computed" in found[name] and "make it a parameter: torch" in found[name] for name in touched
    )
    twin = plain_twin(model)
    torch.testing.assert_close(twin(X), before)
    assert prunable_groups(twin, X).names == ["0.0", "1.0", "2.0", "3.0"]


def test_weights_set_by_an_unknown_hook_are_left_alone():
    model = network()
    conv = model[2][0]
    source = conv.weight
    del conv._parameters["weight"]
    conv.source = source
    conv.register_forward_pre_hook(lambda module, _: setattr(module, "weight", module.source.tanh()))
    found = reasons(model, X)
    reason, remedy = "2.0.weight is computed (a hook or another library's wrapper)", "make it a parameter"
    assert found["1.0"].startswith(f"{reason}; {remedy}, by bake_weights(model, example_inputs)")


# --- everything else is pruned ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "mask", "new spectral_norm"])
@pytest.mark.parametrize("method", ["obs", "catro", "taylor", "itpruner", "psap", "l1"])
def test_one_call_prunes_the_other_groups(kind, method):
    model = network(ALL[kind])
    model.train()
    F.cross_entropy(model(DATA[0][0]), DATA[0][1]).backward()  # leaves a graph behind
    weight = {k: v.clone() for k, v in model[2][0].state_dict().items()}
    dense, _ = count_ops(model, X)
    result = prune(model, X, DATA, budget=BUDGET, method=method)
    assert count_ops(model, X)[0] <= 0.75 * dense
    assert model[0][0].out_channels < 8 or model[3][0].out_channels < 8
    assert all(torch.equal(v, weight[k]) for k, v in model[2][0].state_dict().items())
    assert "2.0.weight is computed" in str(result.report)


@pytest.mark.parametrize("kind", ["weight_norm", "mask", "new weight_norm", "new spectral_norm"])
def test_pruning_while_training(kind):
    model = network(ALL[kind])
    pruner = PSAPPruner(model, X, budget=BUDGET)
    dense = pruner.dense.macs
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    pruner.start(optimizer, total_steps=12)
    model.train()
    for images, labels in DATA * 6:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        pruner.step()
    pruner.finish()
    assert count_ops(model, X)[0] <= 0.75 * dense
    optimizer.zero_grad()
    F.cross_entropy(model(DATA[0][0]), DATA[0][1]).backward()
    optimizer.step()  # it trains the network that is left


@pytest.mark.parametrize("kind", ALL)
def test_copies(kind):
    model = network(ALL[kind])
    recalibrate_batchnorm(model, DATA)
    out = model(X)
    assert torch.equal(copied(model)(X), out)
    distiller = Distiller(model)  # after a pass with gradients
    torch.testing.assert_close(distiller.logits(X), out.detach())
    with torch.no_grad():
        model(X)
    prunable_groups(model, X)
    copy.deepcopy(model)  # the trace leaves no graph behind


def test_copies_leave_cached_tensors_without_their_graph():
    model = network()
    model[0].cache = {"last": [model[0](X)]}
    twin = copied(model)
    assert torch.equal(twin[0].cache["last"][0], model[0].cache["last"][0])
    assert twin[0].cache["last"][0].grad_fn is None and model[0].cache["last"][0].grad_fn is not None


def test_spectral_norms_in_training_do_not_move():
    model = network(parametrizations.spectral_norm).train()
    snapshot = Snapshot(model)
    prunable_groups(model, X)
    BudgetPruner(model, X, importance=tp.importance.MagnitudeImportance(), budget=BUDGET).plan()
    snapshot.check()


@pytest.mark.parametrize("kind", ["weight_norm", "mask", "new spectral_norm"])
def test_layers_are_removed_from_the_others(kind):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(*(conv_bn_relu(8 if i else 3, 8) for i in range(4)), head(8)).eval()
        ALL[kind](model[1][0])
    report = ResConvPruner(model, X, DATA, budget=Budget(macs=0.8)).step()
    assert not {"1.0"} & set(report.removed) and report.removed
    with pytest.raises(ValueError, match=r"2\.0.*its weight is computed: "):
        convert_to_resconv(network(ALL[kind]), X)


# --- weights that follow their filters --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "dim", "expected"),
    [
        (lambda: nn.Conv2d(6, 8, 3), 0, (True, False)),
        (lambda: nn.Conv2d(8, 8, 3), 0, (True, False)),
        (lambda: nn.Conv2d(6, 8, 3), 1, (False, True)),
        (lambda: nn.ConvTranspose2d(6, 8, 3), 0, (False, True)),
        (lambda: nn.ConvTranspose2d(6, 8, 3), 1, (True, False)),
        (lambda: nn.Conv1d(6, 8, 3, bias=False), 0, (True, False)),
        (lambda: nn.Linear(6, 8), 0, (True, False)),
        (lambda: nn.Linear(6, 8), None, (False, False)),
        (lambda: nn.Conv2d(6, 8, 3, groups=2), 0, (False, False)),
    ],
)
def test_weight_norm_follows_the_axis_that_it_keeps(layer, dim, expected):
    changed = parametrizations.weight_norm(layer(), dim=dim)
    assert (follows(changed, "out"), follows(changed, "in")) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    model = network(parametrizations.weight_norm).to(dtype)
    assert prunable_groups(model, X.to(dtype)).names == ["0.0", "2.0", "3.0"]


@pytest.mark.parametrize("kind", [*BY_FILTER, *BY_WEIGHT])
@pytest.mark.parametrize("seed", [0, 1])
def test_masked_is_removed(kind, seed):
    model = network(ALL[kind])
    twin = plain_twin(model)
    groups = prunable_groups(model, X)
    removed = removal(groups, seed)
    assert masked_equals_removed(groups, X, removed) is None  # counts parameters, too
    remove_units(groups, removed)
    remove_units(prunable_groups(twin, X), removed)
    conv = model[2][0]
    assert type(conv).__name__ == "ParametrizedConv2d" and conv.out_channels == twin[2][0].out_channels < 10
    torch.testing.assert_close(conv.weight, twin[2][0].weight, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(model(X), twin(X))


@pytest.mark.parametrize("method", ["obs", "catro", "taylor", "l1", "fpgm", "itpruner", "psap"])
def test_the_same_channels_go_as_with_plain_weights(method):
    model = network(parametrizations.weight_norm, "0.0")  # it reads the images, so that nothing is left out
    twin = plain_twin(model)
    for net in (model, twin):
        prune(net, X, DATA, budget=Budget(macs=0.5), method=method)
    torch.testing.assert_close(model.eval()(X), twin.eval()(X), rtol=1e-3, atol=1e-3)
    assert model[0][0].out_channels == len(model[0][0].parametrizations.weight.original0)


@pytest.mark.parametrize("kind", ["weight_norm", "new weight_norm", "new mask"])
def test_round_trip(kind, tmp_path):
    model = network(ALL[kind])
    prune(model, X, DATA, budget=BUDGET, method="l1", refit="batchnorm")
    save_pruned(model, tmp_path / "pruned.pt")
    again = load_pruned(lambda: network(ALL[kind]), tmp_path / "pruned.pt")
    assert torch.equal(again(X), model.eval()(X))


def test_computed_consumers_are_not_refitted():
    model = network(with_mask)
    report = BudgetPruner(
        model, X, DATA, importance=tp.importance.MagnitudeImportance(), budget=Budget(macs=0.5), allocator="uniform"
    ).step(refit=Refit("sequential", recalibrate=False))
    skipped = {row.name: row.skipped for row in report.refit.rows if row.skipped}
    assert skipped == {"2.0": "its weight is no plain parameter but computed (parametrization Fixed)"}


def test_a_computed_bias_follows_its_filters():
    model = network()
    conv = model[2][0] = nn.Conv2d(12, 10, 3, padding=1)
    parametrize.register_parametrization(conv, "bias", nn.Softplus(), unsafe=True)
    groups = prunable_groups(model, X)
    assert groups["2.0"].width == 10
    remove_units(groups, {"2.0": [0, 7]})
    assert conv.bias.shape == (8,) and model(X).shape == (2, 4)


class Scale(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(channels, 1, 1))

    def forward(self, x):
        return x * self.gamma


def test_a_computed_parameter_of_a_users_module_follows():
    model = network()
    model[1][2] = Scale(12)
    parametrize.register_parametrization(model[1][2], "gamma", nn.Softplus())
    groups = prunable_groups(model, X)
    assert groups.names == ["0.0", "1.0", "2.0", "3.0"]
    remove_units(groups, {"1.0": [0, 7]})
    assert model[1][2].gamma.shape == (10, 1, 1) and model(X).shape == (2, 4)


# --- Torch-Pruning's own pruners --------------------------------------------------------------------------------------


def host_pruner(model, **options):
    importance = tp.importance.MagnitudeImportance()
    return tp.pruner.BasePruner(model, X, importance, pruning_ratio=0.5, ignored_layers=[model[4][2]], **options)


@pytest.mark.parametrize("kind", ["weight_norm", "mask", "new spectral_norm"])
def test_hosts_pruner_is_told_what_is_in_the_way(kind):
    model = network(ALL[kind])
    pruner = host_pruner(model)
    snapshot = Snapshot(model)
    with pytest.raises(RuntimeError, match=r"the model is as before.*2\.0\.weight is computed .*make it a parameter"):
        refitted_step(pruner, X, DATA, refit=Refit("parallel", recalibrate=False))
    snapshot.check()


def test_hosts_pruner_with_our_functions():
    model = network(parametrizations.weight_norm, "0.0")
    report = refitted_step(
        host_pruner(model, customized_pruners=channel_pruners(model)),
        X,
        DATA,
        refit=Refit("parallel", recalibrate=False),
    )
    assert model[0][0].out_channels == 4 and not any(row.skipped for row in report.rows)
    model = network(parametrizations.weight_norm)  # would scale its filters up when inputs go
    with pytest.raises(RuntimeError, match="a removed input would change what the ParametrizedConv2d does"):
        host_pruner(model, customized_pruners=channel_pruners(model)).step()
