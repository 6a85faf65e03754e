"""ResConv through NNI: training by the evaluator, and with other compressors."""

import copy
import warnings

import pytest
import torch

nni = pytest.importorskip("nni")

from nni.compression import TorchEvaluator  # noqa: E402
from nni.compression.distillation import DynamicLayerwiseDistiller  # noqa: E402
from nni.compression.pruning import L1NormPruner  # noqa: E402

from helpers.nni_resconv_cases import (  # noqa: E402
    CONVS,
    HALF,
    LAYERS,
    LOADER,
    MARKS,
    assert_sped_up,
    evaluator_of,
    network,
    pruner_of,
    scale,
)
from nni_plugins import ResConvPruner, speedup  # noqa: E402
from nni_plugins.evaluator import _groups  # noqa: E402
from nni_plugins.testing import TrainingLog, assert_same_masks, output, relative_error, training_step, wrappers  # noqa: E402
from tp_importance import Budget, convert_to_resconv, count_ops  # noqa: E402
from tp_importance.budget import Cost  # noqa: E402
from tp_importance.methods.resconv import resconv_layers  # noqa: E402
from tp_importance.testing import Snapshot  # noqa: E402

pytestmark = MARKS


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
    before = Snapshot(model)
    with pytest.raises(ValueError, match="holds no parameter of this Sequential"):
        ResConvPruner(model, CONVS, evaluator_of(network()[0]), budget=HALF, example_inputs=x)
    before.check()


def test_scalars_in_a_second_optimizer_are_refused():
    model, x = network()
    convert_to_resconv(model, x)
    before = Snapshot(model)
    sgd = nni.trace(torch.optim.SGD)
    optimizers = [sgd(model[0].parameters(), lr=0.1), sgd(model[1].parameters(), lr=0.1)]
    evaluator = TorchEvaluator(lambda *_: None, optimizers, training_step)
    with pytest.raises(ValueError, match=r"1\.0\.s is in another optimizer of the evaluator"):
        ResConvPruner(model, CONVS, evaluator, budget=HALF, example_inputs=x)
    before.check()


def test_an_optimizer_without_parameter_groups_is_an_error():
    model, x = network()
    optimizer = nni.trace(torch.optim.LBFGS)(list(model.parameters()))
    evaluator = TorchEvaluator(lambda *_: None, optimizer, training_step)
    pruner = ResConvPruner(model, CONVS, evaluator, budget=HALF, example_inputs=x)
    before = Snapshot(model)
    with pytest.raises(ValueError, match="LBFGS doesn't support per-parameter options"):
        pruner.compress(max_steps=1)
    before.check()
    assert evaluator.model is None


def test_training_without_an_evaluator_is_refused():
    pruner, _ = pruner_of()
    before = Snapshot(pruner.bound_model)
    for length in ({"max_steps": 1}, {"max_epochs": 1}):
        with pytest.raises(ValueError, match="need an evaluator"):
            pruner.compress(**length)
    before.check()
    assert before.model is pruner.bound_model


def test_a_training_function_with_an_optimizer_of_its_own_is_an_error():
    model, x = network()

    def train(model, optimizer, training_step, lr_scheduler=None, max_steps=None, max_epochs=None):
        own = torch.optim.SGD(model.parameters(), lr=0.1)
        training_step(LOADER[0], model).backward()
        own.step()

    evaluator = TorchEvaluator(train, nni.trace(torch.optim.SGD)(model.parameters(), lr=0.1), training_step)
    pruner = ResConvPruner(model, CONVS, evaluator, budget=HALF, example_inputs=x)
    before = Snapshot(model, gradients=False)
    with pytest.raises(RuntimeError, match="never stepped the optimizer"):
        pruner.compress(max_steps=1)
    before.check()


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
    before, masks = Snapshot(model, gradients=False), pruner.get_masks()
    error, message = (UserWarning, "has a=0") if fault == "warning" else (OSError, "disk on fire")
    with warnings.catch_warnings(), pytest.raises(error, match=message):
        warnings.simplefilter("error", UserWarning)
        pruner.compress(max_steps=4)
    assert calls
    before.check()
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
    before = Snapshot(model)
    with pytest.raises(ValueError, match=r"layer 1\.0 is wrapped by the other compressor"):
        ResConvPruner.from_compressor(distiller, CONVS, budget=HALF, example_inputs=x)
    before.check()
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


def test_progress_names_the_training_and_what_follows(capfd):
    pruner, _ = pruner_of(train=True, progress=True)
    pruner.compress(max_steps=4)
    err = capfd.readouterr().err
    assert [p for p in ("training", "4/4", "collecting", "choosing layers") if p not in err] == []
    pruner, _ = pruner_of(train=True)
    pruner.compress(max_steps=4)
    assert "training" not in capfd.readouterr().err
