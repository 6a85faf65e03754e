"""ResConv through NNI: conversion, training by the evaluator, masks, removal."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn

nni = pytest.importorskip("nni")

from nni.compression import TorchEvaluator  # noqa: E402
from nni.compression.distillation import DynamicLayerwiseDistiller  # noqa: E402
from nni.compression.pruning import L1NormPruner  # noqa: E402
from nni.compression.speedup import ModelSpeedup  # noqa: E402
from nni.compression.speedup.error_code import EmptyLayerError  # noqa: E402
from nni.compression.utils.counter import count_flops_params  # noqa: E402

from networks import Residual, class_loader, conv_bn_relu, head, randomise_batchnorm  # noqa: E402
from nni_contract import (  # noqa: E402
    TrainingLog,
    assert_same_masks,
    assert_unchanged,
    hooks,
    make_evaluator,
    output,
    relative_error,
    snapshot,
    threads,
    training_step,
    wrappers,
)
from nni_plugins import CATROPruner, ResConvPruner, speedup  # noqa: E402
from nni_plugins.states import _groups  # noqa: E402
from tp_importance import (  # noqa: E402
    Budget,
    BudgetError,
    Cost,
    ResConv2d,
    convert_to_resconv,
    count_ops,
    load_pruned,
    save_pruned,
)
from tp_importance.resconv import resconv_layers  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:layer .* has a=0"),  # training may put it there
    pytest.mark.filterwarnings("ignore:.*step.* has been overridden"),  # by NNI, on purpose
]

CONVS = [{"op_types": ["Conv2d"]}]
LAYERS = ["1.0", "2.0", "3.body.0.0", "3.body.1.0", "4.body.1.0"]
LOADER = class_loader(shape=(3, 10, 10))
HALF = Budget(macs=0.6)


@pytest.fixture(autouse=True)
def one_thread():
    with threads(1):
        yield


def network(seed=0):
    """A chain and two residual blocks: 5 of 8 convolutions can hold a shortcut."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        blocks = [Residual(8, 8, 8), Residual(8, 12, 12, stride=2)]
        model = nn.Sequential(conv_bn_relu(3, 8), conv_bn_relu(8, 8), conv_bn_relu(8, 8), *blocks, head(12))
    x = torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(seed))
    randomise_batchnorm(model, x, seed)
    return model.eval(), x


def evaluator_of(model, log=None, step=training_step, **options):
    """The contract's evaluator, or one with another training step or optimizer."""
    if not options and step is training_step:
        return make_evaluator(model, LOADER, log or TrainingLog())
    optimizer = nni.trace(torch.optim.SGD)(options.pop("params", None) or model.parameters(), lr=0.05, **options)
    return TorchEvaluator(make_evaluator(model, LOADER, log or TrainingLog()).training_func, optimizer, step)


def pruner_of(config_list=CONVS, *, train=False, budget=HALF, **options):
    model, x = network()
    evaluator = evaluator_of(model) if train else None
    return ResConvPruner(model, config_list, evaluator, budget=budget, example_inputs=x, a=0.5, **options), x


def scale(pruner, name):
    return pruner._module_wrappers[name].s


def assert_sped_up(pruner, masks, x, plan=None):
    """The masked model, sped up, computes the same, costs what was planned and is plain."""
    model, plan = pruner.bound_model.eval(), plan or pruner.plan
    masked = output(model, x)
    pruner.unwrap_model()
    assert speedup(model, x, masks) is model
    assert relative_error(masked, output(model, x)) <= 1e-5
    assert not resconv_layers(model) and not wrappers(model) and not hooks(model)
    assert Cost(*count_ops(model, x)) == plan.cost
    assert all(getattr(plan.cost, f) <= limit for f, limit in plan.limits.items())
    assert count_flops_params(model, x, verbose=False)[0] == plan.cost.macs


# -- conversion, selected by config_list


def test_conversion_keeps_the_function_and_lists_what_it_left_out():
    model, x = network()
    before = output(model, x)
    pruner = ResConvPruner(model, CONVS, budget=HALF, example_inputs=x)
    assert list(resconv_layers(model)) == LAYERS
    assert pruner.left_out.keys() == {"0.0", "4.body.0.0", "4.shortcut.0"}
    assert torch.equal(output(model, x), before)
    assert {n for n in wrappers(model) if "body" not in n} == {"1.0._nni_wrapper", "2.0._nni_wrapper"}
    assert list(pruner.get_masks()) == LAYERS


@pytest.mark.parametrize(
    ("config_list", "layers"),
    [
        ([{"op_names": ["1.0", "3.body.1.0"]}], ["1.0", "3.body.1.0"]),
        ([{"op_names_re": [r"3\.body.*"]}], ["3.body.0.0", "3.body.1.0"]),
        ([{"op_types": ["Conv2d"], "exclude_op_names": ["1.0", "2.0"]}], LAYERS[2:]),
        ([{"op_types": ["Conv2d"], "exclude_op_names_re": [r".*body.*"]}], LAYERS[:2]),
        ([{"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.5}], LAYERS),
        ([{"op_names": ["1.0"]}, {"op_names": ["2.0"], "sparse_ratio": 0.3}], LAYERS[:2]),
        ([{"sparsity": 0.5, "op_types": ["Conv2d"]}, {"exclude": True, "op_names": ["2.0"]}], ["1.0", *LAYERS[2:]]),
    ],
)
def test_selection(config_list, layers):
    config_list = copy.deepcopy(config_list)
    given = copy.deepcopy(config_list)
    pruner, x = pruner_of(config_list, budget=Budget(macs=0.9))
    assert config_list == given
    assert list(resconv_layers(pruner.bound_model)) == layers
    with pytest.warns(UserWarning, match="nothing was trained"):
        _, masks = pruner.compress()
    assert list(masks) == layers
    assert_sped_up(pruner, masks, x)


def test_selection_in_a_converted_model_uses_the_names_before():
    model, x = network()
    convert_to_resconv(model, x, ignored_layers=[model[1][0]])
    layers = LAYERS[1:]
    with pytest.raises(ValueError, match=r"layer 2\.0 is a ResConv2d already"):
        ResConvPruner(model, [{"op_names_re": [r"[34].*"]}], budget=HALF, example_inputs=x)
    pruner = ResConvPruner(model, [{"op_types": ["Conv2d"]}], budget=HALF, example_inputs=x)
    assert list(pruner.get_masks()) == layers


def test_a_layer_that_is_named_and_cannot_be_converted_is_warned_of():
    with pytest.warns(UserWarning, match=r"named in config_list: \{'4\.shortcut\.0': 'stride"):
        pruner_of([{"op_names": ["4.shortcut.0", "1.0", "2.0"]}], budget=Budget(macs=0.9))


@pytest.mark.parametrize(
    ("config_list", "message"),
    [
        ([{"op_types": ["Linear"]}], "selects no nn.Conv2d"),
        ([{"op_names": ["0.0", "4.shortcut.0"]}], "no convolution that could take a shortcut"),
        ([{"op_names": ["nowhere"]}], r"op_names names \['nowhere'\]"),
        ([{**CONVS[0], "max_sparse_ratio": 0.5}], "max_sparse_ratio"),
        ([{**CONVS[0], "sparse_ratio": 0.0}], "ambiguous"),
        ([{**CONVS[0], "sparse_ratio": 1.5}], "sparse_ratio=1.5"),
        ([{**CONVS[0], "sparse_threshold": 0.1}], "sparse_threshold"),
        ([{**CONVS[0], "global_group_id": 1, "sparse_ratio": 0.5}], "global_group_id"),
        ([{**CONVS[0], "granularity": "in_channel"}], "granularity"),
        ([{**CONVS[0], "target_names": ["_output_"]}], "target_names"),
        ([{**CONVS[0], "budget": 1}], "NNI refuses the config_list"),
        ({"op_types": ["Conv2d"]}, "must be a list of dicts"),
    ],
)
def test_bad_config_list(config_list, message):
    model, x = network()
    before = snapshot(model.train())
    with pytest.raises(ValueError, match=message):
        ResConvPruner(model, config_list, budget=HALF, example_inputs=x)
    assert_unchanged(before, model)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"budget": Budget(macs=0.01)}, BudgetError, "cannot be reached by removing layers"),
        ({"budget": 0.5}, TypeError, "must be a Budget"),
        ({"reg": -1}, ValueError, "reg=-1"),
        ({"importance": "l1"}, ValueError, "importance='l1'"),
        ({"a": -1}, ValueError, "a=-1"),
        ({"no_option": 1}, TypeError, "no_option"),
        ({"evaluator": "SGD"}, TypeError, "evaluator is a str"),
    ],
)
def test_bad_options_leave_the_model_alone(options, error, message):
    model, x = network()
    before = snapshot(model.train())
    evaluator = evaluator_of(model)
    state = dict(vars(evaluator))
    options = {"budget": HALF, "evaluator": evaluator, **options}
    with pytest.raises(error, match=message):
        ResConvPruner(model, CONVS, example_inputs=x, **options)
    assert_unchanged(before, model)
    assert vars(evaluator) == state
    ResConvPruner(model, CONVS, evaluator, budget=HALF, example_inputs=x).compress(max_steps=1)  # still good


def test_a_wrapped_model_is_refused():
    pruner, x = pruner_of()
    before = snapshot(pruner.bound_model)
    with pytest.raises(RuntimeError, match="still wrapped by NNI"):
        ResConvPruner(pruner.bound_model, CONVS, budget=HALF, example_inputs=x)
    assert_unchanged(before, pruner.bound_model)
    pruner.unwrap_model()
    ResConvPruner(pruner.bound_model, CONVS, budget=HALF, example_inputs=x)  # converted, but free


# -- without training


@pytest.mark.parametrize("budget", [HALF, Budget(params=0.7), Budget(macs=0.7, params=0.6), Budget(macs=0.5)])
@pytest.mark.parametrize("importance", ["scale", "output", lambda _, layers: dict.fromkeys(layers, 1.0)])
def test_budget_is_met_and_masked_is_removed(budget, importance):
    pruner, x = pruner_of(budget=budget, importance=importance, loader=LOADER)
    dense = Cost(*count_ops(network()[0], x))
    with pytest.warns(UserWarning, match="nothing was trained"):
        model, masks = pruner.compress()
    assert model is pruner.bound_model and wrappers(model)
    assert pruner.plan.dense == dense and pruner.plan.limits == budget.limits(dense)
    assert [n for n, m in masks.items() if not m["s"].item()] == pruner.plan.removed
    assert 0 < len(pruner.plan.removed) < len(LAYERS)
    assert_sped_up(pruner, masks, x)


def test_measured_latency():
    pruner, x = pruner_of(
        budget=Budget(latency=0.999), min_run_time=0.01, importance=lambda _, n: dict.fromkeys(n, 1.0)
    )
    with pytest.warns(UserWarning):
        _, masks = pruner.compress()
    assert pruner.plan.latency_ms["measured"] <= pruner.plan.latency_ms["limit"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the masks remove no layer")  # fusing may be enough
        assert_sped_up(pruner, masks, x)


def test_every_subset_of_layers():
    pruner, x = pruner_of(importance=lambda _, layers: dict.fromkeys(layers, 1.0))
    model = pruner.bound_model
    for bits in range(1, 2 ** len(LAYERS)):
        masks = {n: {"s": torch.tensor([float(not bits >> i & 1)])} for i, n in enumerate(LAYERS)}
        pruner.update_masks(masks)
        masked = output(model, x)
        pruner.unwrap_model()
        twin = speedup(copy.deepcopy(model), x, masks)
        pruner.wrap_model()
        assert relative_error(masked, output(twin, x)) <= 1e-5
        assert not resconv_layers(twin)


def test_a_layer_with_a_zero_is_the_identity():
    model, x = network()
    pruner = ResConvPruner(model, CONVS, budget=HALF, example_inputs=x)
    with pytest.warns(UserWarning, match="nothing was trained"), pytest.warns(UserWarning, match="has a=0: masked"):
        _, masks = pruner.compress()
    assert all(model.get_submodule(n).a.item() == float(n in pruner.plan.removed) for n in LAYERS)
    pruner._planner.budget = Budget(macs=1.0)
    with pytest.warns(UserWarning, match="already meets the budget"):
        pruner.compress()  # everything is to stay
    assert all(model.get_submodule(n).a.item() == 0 for n in LAYERS)
    pruner._planner.budget = HALF
    with pytest.warns(UserWarning, match="nothing was trained"), pytest.warns(UserWarning, match="has a=0: masked"):
        assert_same_masks(masks, pruner.compress()[1])
    assert_sped_up(pruner, masks, x)


def test_batch_norm_without_weights_and_none_at_all():
    torch.manual_seed(0)
    bare = [nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6, affine=False)]
    model, x = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), *bare, nn.ReLU(), head(6)), torch.randn(2, 3, 8, 8)
    randomise = model.train()(torch.randn(16, 3, 8, 8))  # running statistics that are not 0 and 1
    assert randomise.shape[0] == 16
    pruner = ResConvPruner(model.eval(), CONVS, budget=Budget(macs=0.21), example_inputs=x, a=0.5)
    with pytest.warns(UserWarning):
        _, masks = pruner.compress()
    assert pruner.plan.removed == ["2", "4"]
    assert_sped_up(pruner, masks, x)


def test_masks_survive_a_safe_file_and_a_second_compress():
    pruner, x = pruner_of()
    with pytest.warns(UserWarning):
        _, masks = pruner.compress()
        assert_same_masks(masks, pruner.compress()[1])
    file = io.BytesIO()
    torch.save(masks, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert_same_masks(masks, loaded)
    assert_sped_up(pruner, loaded, x)


def test_the_result_survives_a_safe_file(tmp_path):
    pruner, x = pruner_of()
    with pytest.warns(UserWarning):
        _, masks = pruner.compress()
    assert_sped_up(pruner, masks, x)
    save_pruned(pruner.bound_model, tmp_path / "small.pt")
    loaded = load_pruned(lambda: network(seed=1)[0], tmp_path / "small.pt")
    assert torch.equal(output(loaded.eval(), x), output(pruner.bound_model, x))


def test_one_evaluator_serves_one_pruner_after_the_other():
    pruner, x = pruner_of(train=True, budget=Budget(macs=0.8))
    pruner.compress(max_steps=2)
    pruner.unwrap_model()
    factor = pruner.bound_model.get_submodule("1.0").s.item()
    again = ResConvPruner(pruner.bound_model, CONVS, pruner.evaluator, budget=HALF, example_inputs=x)
    assert scale(again, "1.0").item() == factor
    _, masks = again.compress(max_steps=2)
    assert scale(again, "1.0").item() != factor
    assert_sped_up(again, masks, x)


def test_unwrapping_leaves_the_converted_network():
    pruner, x = pruner_of()
    converted = convert_to_resconv(network()[0], x, a=0.5)
    with pytest.warns(UserWarning):
        pruner.compress()
    assert not torch.equal(output(pruner.bound_model, x), output(converted, x))
    pruner.unwrap_model()
    assert torch.equal(output(pruner.bound_model, x), output(converted, x))
    state, other = pruner.bound_model.state_dict(), converted.state_dict()
    assert state.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in state.items())
    assert all(isinstance(p, nn.Parameter) for p in pruner.bound_model.parameters())


def test_modes_and_flags_stay():
    model, x = network()
    model.train()[1].eval()
    model[2].requires_grad_(False)
    flags = {n: p.requires_grad for n, p in convert_to_resconv(copy.deepcopy(model), x).named_parameters()}
    pruner = ResConvPruner(model, CONVS, evaluator_of(model), budget=HALF, example_inputs=x, a=0.5)
    pruner.compress(max_steps=2)
    assert model.training and model[2][1].training and not model[1][0].training and not model[1][0].conv.training
    pruner.unwrap_model()
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    masks = {"1.0": {"s": torch.zeros(1)}}
    speedup(model, x, masks)
    assert model.training and model[3].body[0][0].training and not hooks(model)


# -- with training


@pytest.mark.parametrize("length", [{"max_steps": 12}, {"max_epochs": 3}, {"max_steps": 12, "max_epochs": 9}])
def test_training_moves_s_and_makes_exact_zeros(length):
    model, x = network()
    log = TrainingLog()
    weights = copy.deepcopy(dict(model.named_parameters()))
    pruner = ResConvPruner(
        model, CONVS, evaluator_of(model, log), budget=Budget(macs=0.7), example_inputs=x, loader=LOADER, reg=2.0
    )
    _, masks = pruner.compress(**length)
    assert len(log.losses) == 12 and set(log.hooks) == {0}
    factors = [scale(pruner, name).item() for name in LAYERS]
    assert 0.0 in factors and all(f != 1.0 for f in factors)
    moved = {n.replace("_nni_wrapper.", "").replace("conv.", ""): p for n, p in model.named_parameters()}
    assert not torch.equal(moved["1.0.weight"], weights["1.0.weight"])  # the inner convolutions learn, too
    assert not torch.equal(model[5][2].weight, weights["5.2.weight"])
    assert all(model.get_submodule(name).a.item() >= 0 for name in LAYERS)
    assert pruner.evaluator.model is None and pruner.evaluator._optimizers is None
    assert_sped_up(pruner, masks, x)


def test_one_step_is_the_proximal_one():
    """With a learning rate r and λ, s becomes soft(s − r ∂L/∂s, r λ); without λ that is the plain step."""
    factors = []
    for reg in (0.0, 3.0):
        model, x = network()
        pruner = ResConvPruner(model, CONVS, evaluator_of(model), budget=HALF, example_inputs=x, reg=reg, a=0.5)
        pruner.compress(max_steps=1)  # with a = 0 a batch norm that follows would cancel s, and its gradient be 0
        factors.append({name: scale(pruner, name).item() for name in LAYERS})
    for name in LAYERS:
        plain, proximal = (f[name] for f in factors)
        assert plain != 1.0
        assert proximal == pytest.approx(max(abs(plain) - 0.05 * 3.0, 0.0) * (1 if plain > 0 else -1), abs=1e-6)


def test_scalars_have_no_weight_decay_and_the_schedule_acts_on_them():
    model, x = network()
    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.5)
    scheduler = nni.trace(torch.optim.lr_scheduler.StepLR)(optimizer, 1, gamma=0.1)
    seen = []

    def train(model, optimizer, training_step, lr_scheduler=None, max_steps=None, max_epochs=None):
        names = {id(p): n for n, p in model.named_parameters()}
        for x, y in LOADER[:max_steps]:
            groups = optimizer.param_groups
            seen.append([({names[id(p)] for p in g["params"]}, g["weight_decay"], g["lr"]) for g in groups])
            optimizer.zero_grad()
            training_step((x, y), model).backward()
            optimizer.step()
            lr_scheduler.step()

    evaluator = TorchEvaluator(train, optimizer, training_step, scheduler)
    ResConvPruner(model, CONVS, evaluator, budget=HALF, example_inputs=x).compress(max_steps=2)
    scalars = {f"{n}.{p}" for n in LAYERS for p in ("_nni_wrapper.s", "a")}
    for step, rate in zip(seen, (0.1, 0.01), strict=True):
        (rest, decay, lr), (held, none, their_lr) = step
        assert held == scalars and decay == 0.5 and none == 0.0
        assert lr == their_lr == pytest.approx(rate)
        assert len(rest) + len(held) == len(list(model.parameters()))


def test_an_optimizer_of_the_converted_model_keeps_its_groups():
    model, x = network()
    convert_to_resconv(model, x, a=0.5)
    scalars = [p for layer in resconv_layers(model).values() for p in (layer.s, layer.a)]
    rest = [p for p in model.parameters() if not any(p is other for other in scalars)]
    groups = [{"params": rest}, {"params": scalars, "lr": 0.5, "weight_decay": 0.1}]
    evaluator = evaluator_of(model, params=groups, weight_decay=0.2)
    pruner = ResConvPruner(model, CONVS, evaluator, budget=HALF, example_inputs=x, reg=0.0)
    (held,) = [g for g in _groups(evaluator._optimizer_helpers[0]) if "1.0.s" in g["params"]]
    assert held["lr"] == 0.5 and held["weight_decay"] == 0.0 and len(held["params"]) == 2 * len(LAYERS)
    pruner.compress(max_steps=1)
    assert scale(pruner, "1.0").item() != 1.0


def test_an_optimizer_of_another_model_is_refused():
    model, x = network()
    before = snapshot(model)
    with pytest.raises(ValueError, match="holds no parameter of this Sequential"):
        ResConvPruner(model, CONVS, evaluator_of(network()[0]), budget=HALF, example_inputs=x)
    assert_unchanged(before, model)


def test_scalars_in_a_second_optimizer_are_refused():
    model, x = network()
    convert_to_resconv(model, x)
    before = snapshot(model)
    sgd = nni.trace(torch.optim.SGD)
    optimizers = [sgd(model[0].parameters(), lr=0.1), sgd(model[1].parameters(), lr=0.1)]
    evaluator = TorchEvaluator(lambda *_: None, optimizers, training_step)
    with pytest.raises(ValueError, match=r"1\.0\.s is in another optimizer of the evaluator"):
        ResConvPruner(model, CONVS, evaluator, budget=HALF, example_inputs=x)
    assert_unchanged(before, model)


def test_an_optimizer_without_parameter_groups_is_an_error():
    model, x = network()
    optimizer = nni.trace(torch.optim.LBFGS)(list(model.parameters()))
    evaluator = TorchEvaluator(lambda *_: None, optimizer, training_step)
    pruner = ResConvPruner(model, CONVS, evaluator, budget=HALF, example_inputs=x)
    before = snapshot(model)
    with pytest.raises(ValueError, match="LBFGS doesn't support per-parameter options"):
        pruner.compress(max_steps=1)
    assert_unchanged(before, model)
    assert evaluator.model is None


def test_training_without_an_evaluator_is_refused():
    pruner, _ = pruner_of()
    before = snapshot(pruner.bound_model)
    for length in ({"max_steps": 1}, {"max_epochs": 1}):
        with pytest.raises(ValueError, match="need an evaluator"):
            pruner.compress(**length)
    assert_unchanged(before, pruner.bound_model)


def test_a_training_function_with_an_optimizer_of_its_own_is_an_error():
    model, x = network()

    def train(model, optimizer, training_step, lr_scheduler=None, max_steps=None, max_epochs=None):
        own = torch.optim.SGD(model.parameters(), lr=0.1)
        training_step(LOADER[0], model).backward()
        own.step()

    evaluator = TorchEvaluator(train, nni.trace(torch.optim.SGD)(model.parameters(), lr=0.1), training_step)
    pruner = ResConvPruner(model, CONVS, evaluator, budget=HALF, example_inputs=x)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="never stepped the optimizer"):
        pruner.compress(max_steps=1)
    assert_unchanged(before, model)


@pytest.mark.parametrize("fault", ["step", "loader", "warning"])
def test_failing_in_the_middle_leaves_the_model_as_it_was(fault):
    model, x = network()
    calls = []

    def broken(batch, model):
        calls.append(1)
        if fault == "step" and len(calls) == 3:
            raise OSError("disk on fire")
        return training_step(batch, model)

    class Loader:
        def __iter__(self):
            yield LOADER[0]
            raise OSError("disk on fire")

    pruner = ResConvPruner(
        model.train(),
        CONVS,
        evaluator_of(model, step=broken),
        budget=HALF,
        example_inputs=x,
        loader={"loader": Loader(), "warning": None}.get(fault, LOADER),
        reg=0.0,
    )
    model.get_submodule("1.0").eval()
    with torch.no_grad():
        model(x)  # leaves masked tensors on the modules
    before, masks = snapshot(model), pruner.get_masks()
    error, message = (UserWarning, "has a=0") if fault == "warning" else (OSError, "disk on fire")
    with warnings.catch_warnings(), pytest.raises(error, match=message):
        warnings.simplefilter("error", UserWarning)
        pruner.compress(max_steps=4)
    assert calls
    assert_unchanged(before, model)
    assert_same_masks(masks, pruner.get_masks())
    assert pruner.plan is None and pruner.evaluator.model is None and not pruner.evaluator.get_all_hooks()
    if fault == "step":
        pruner.compress(max_steps=4)  # the fourth call and on: as if nothing had been
        assert pruner.plan is not None


# -- with another compressor


def distiller_of(model, config, log=None):
    teacher, taught = copy.deepcopy(network()[0]), []

    def teach(batch, teacher):
        taught.append(1)
        return teacher(batch[0])

    return DynamicLayerwiseDistiller(model, config, evaluator_of(model, log), teacher, teach), taught


LINEAR = [{"op_types": ["Linear"], "lambda": 0.1, "apply_method": "mse"}]


def test_fused_with_a_distiller():
    model, x = network()
    log = TrainingLog()
    weights = copy.deepcopy(dict(model.named_parameters()))
    distiller, taught = distiller_of(model, LINEAR, log)
    pruner = ResConvPruner.from_compressor(distiller, CONVS, budget=HALF, example_inputs=x, loader=LOADER, reg=2.0)
    with pytest.raises(ValueError, match="give max_steps or max_epochs"):
        pruner.compress()
    _, masks = pruner.compress(max_steps=12)
    assert len(taught) == len(log.losses) == 12
    assert any(scale(pruner, name).item() == 0 for name in LAYERS)
    for name in LAYERS:  # the evaluator knew them by their names before
        assert not torch.equal(model.get_submodule(name).conv.weight, weights[f"{name}.weight"])
        assert not torch.equal(model.get_submodule(name).bn.weight, weights[f"{name[:-1]}1.weight"])
    assert set(masks) == set(LAYERS)
    assert_sped_up(pruner, masks, x)


def test_a_distiller_made_from_the_pruner():
    pruner, x = pruner_of(train=True, reg=2.0)
    teacher = network()[0]
    distiller = DynamicLayerwiseDistiller.from_compressor(
        pruner, LINEAR, teacher_model=teacher, teacher_predict=lambda batch, teacher: teacher(batch[0])
    )
    distiller.compress(12, None)
    assert any(scale(pruner, name).item() == 0 for name in LAYERS)
    masks = pruner.get_masks()
    masked = output(distiller.bound_model.eval(), x)
    distiller.unwrap_model()
    assert relative_error(masked, output(speedup(distiller.bound_model, x, masks), x)) <= 1e-5
    assert Cost(*count_ops(distiller.bound_model, x)) == pruner.plan.cost


def test_a_distiller_of_layers_to_convert_needs_the_conversion_first():
    config = [{"op_names": ["1.0"], "lambda": 0.1, "apply_method": "mse"}]
    model, x = network()
    distiller, _ = distiller_of(model, config)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"layer 1\.0 is wrapped by the other compressor"):
        ResConvPruner.from_compressor(distiller, CONVS, budget=HALF, example_inputs=x)
    assert_unchanged(before, model)
    assert wrappers(model) == ["1.0._nni_wrapper"]
    model, x = network()
    convert_to_resconv(model, x)
    distiller, taught = distiller_of(model, config)
    pruner = ResConvPruner.from_compressor(distiller, CONVS, budget=HALF, example_inputs=x, reg=2.0)
    _, masks = pruner.compress(max_steps=8)
    assert len(taught) == 8
    assert_sped_up(pruner, masks, x)


def test_a_pruner_of_channels_is_refused():
    model, x = network()
    pruner = L1NormPruner(model, [{"op_names": ["0.0"], "sparse_ratio": 0.5}])
    with pytest.raises(ValueError, match=r"layer 0\.0 has masks of another pruner"):
        ResConvPruner.from_compressor(pruner, CONVS, budget=HALF, example_inputs=x)
    assert not resconv_layers(model) and wrappers(model) == ["0.0._nni_wrapper"]


# -- speedup


def test_channels_are_pruned_after_the_layers():
    pruner, x = pruner_of()
    with pytest.warns(UserWarning):
        _, masks = pruner.compress()
    assert_sped_up(pruner, masks, x)
    model = pruner.bound_model
    catro = CATROPruner(model, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], loader=LOADER)
    _, masks = catro.compress()
    masked = output(model, x)
    catro.unwrap_model()
    speedup(model, x, masks)
    assert relative_error(masked, output(model, x)) <= 1e-5
    assert model[0][0].out_channels == 4


@pytest.mark.parametrize(
    ("masks", "error", "message"),
    [
        ({"1.0.conv": {"weight": torch.zeros(8, 1, 1, 1)}}, ValueError, "remove layers and fuse first"),
        ({"1.0": {"s": torch.tensor([0.5])}}, ValueError, "must be one number, 0"),
        ({"1.0": {"s": torch.zeros(2)}}, ValueError, "must be one number, 0"),
        ({"0.0": {"s": torch.zeros(1)}}, ValueError, "the model has none of that name"),
        ({"1.0": {"s": 0}}, TypeError, "of type int"),
        ({"1.0": torch.zeros(1)}, TypeError, "masks of '1.0' are of type Tensor"),
        ([1], TypeError, "masks are of type list"),
    ],
)
def test_bad_masks(masks, error, message):
    pruner, x = pruner_of()
    pruner.unwrap_model()
    before = snapshot(pruner.bound_model.train())
    with pytest.raises(error, match=message):
        speedup(pruner.bound_model, x, masks)
    assert_unchanged(before, pruner.bound_model)


def test_speedup_of_a_wrapped_and_of_a_fused_model():
    pruner, x = pruner_of()
    with pytest.warns(UserWarning):
        model, masks = pruner.compress()
    with pytest.raises(RuntimeError, match="unwrap_model"):
        speedup(model, x, masks)
    assert_sped_up(pruner, masks, x)
    with pytest.raises(ValueError, match=r"no parameter '1\.0\.s'"):
        speedup(model, x, {"1.0": {"s": torch.ones(1)}})


def test_masks_that_remove_nothing_fuse():
    pruner, x = pruner_of()
    before = output(pruner.bound_model, x)
    masks = pruner.get_masks()
    pruner.unwrap_model()
    with pytest.warns(UserWarning, match="remove no layer"):
        model = speedup(pruner.bound_model, x, masks)
    assert relative_error(before, output(model, x)) <= 1e-5 and not resconv_layers(model)


def test_an_error_while_fusing_leaves_the_model_alone(monkeypatch):
    pruner, x = pruner_of()
    pruner.unwrap_model()
    model = pruner.bound_model.train()
    before = snapshot(model)

    def broken(layer):
        raise OSError("no memory")

    monkeypatch.setattr(ResConv2d, "fused", broken)
    with pytest.raises(OSError, match="no memory"):
        speedup(model, x, {"1.0": {"s": torch.zeros(1)}})
    assert_unchanged(before, model)


def test_what_nni_itself_cannot_do():
    """Masks on s it drops without a word; whole convolutions it refuses. Should that change, so should our text."""
    pruner, x = pruner_of()
    with pytest.warns(UserWarning):
        model, masks = pruner.compress()
    masked = output(model, x)
    pruner.unwrap_model()
    ModelSpeedup(model, x, masks, graph_module=torch.fx.symbolic_trace(model)).speedup_model()
    assert count_ops(model.eval(), x)[0] == pruner.plan.dense.macs
    assert relative_error(masked, output(model, x)) > 0.1
    plain, x = network()
    whole = {"1.0": {"weight": torch.zeros_like(plain.get_submodule("1.0").weight)}}
    with pytest.raises(ValueError, match=r"EmptyLayerError.*ResConvPruner removes layers"):
        speedup(plain, x, whole)
    with pytest.raises(EmptyLayerError):
        ModelSpeedup(plain, x, whole, graph_module=torch.fx.symbolic_trace(plain)).speedup_model()


def test_half_precision():
    model, x = network()
    model, x = model.to(torch.bfloat16), x.to(torch.bfloat16)
    pruner = ResConvPruner(model, CONVS, budget=HALF, example_inputs=x, a=0.5)
    with pytest.warns(UserWarning):
        _, masks = pruner.compress()
    masked = output(model, x).float()
    pruner.unwrap_model()
    assert relative_error(masked, output(speedup(model, x, masks), x).float()) <= 10 * torch.finfo(torch.bfloat16).eps
