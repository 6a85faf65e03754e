import copy
import gc

import pytest
import torch

nni = pytest.importorskip("nni")

from nni.compression.distillation import DynamicLayerwiseDistiller  # noqa: E402
from nni.compression.pruning import AGPPruner  # noqa: E402

from nni_plugins import PSAPPruner, speedup  # noqa: E402
from nni_plugins.testing import (  # noqa: E402
    TrainingLog,
    assert_masked_is_removed,
    assert_same_masks,
    case,
    hooks,
    make_evaluator,
    output,
    removed_filters,
    wrappers,
)
from nni_plugins.testing.cases import HALF, LEFT_OUT  # noqa: E402
from tp_importance import Budget, BudgetError, PSAPSchedule, count_ops, prunable_groups  # noqa: E402
from tp_importance import PSAPPruner as Reference  # noqa: E402
from tp_importance.budget import Cost  # noqa: E402
from tp_importance.testing import Snapshot  # noqa: E402

CONVS = [{"op_types": ["Conv2d"]}]
SCHEDULE = PSAPSchedule(prune_steps=2, begin=0.2, end=0.6, pulse=2)


pytestmark = pytest.mark.usefixtures("one_thread")


def make(name="residual", config=None, **options):
    """Pruner of a copy, its case, and the log of its training."""
    this, log = case(name), TrainingLog()
    model = copy.deepcopy(this.model)
    evaluator = options.pop("evaluator", None) or make_evaluator(model, this.loader, log)
    options = {"schedule": SCHEDULE, "example_inputs": this.x, **options}
    if config is None:
        config = copy.deepcopy(HALF)
        if "budget" in options:
            del config[0]["sparse_ratio"]
    return PSAPPruner(model, config, evaluator, **options), this, log


@pytest.mark.filterwarnings("ignore:left alone, though selected")
@pytest.mark.parametrize(
    "name", ["residual", "concat", "dense", "depthwise", "grouped", "flatten", "se", "transposed", "no_bn", "preact"]
)
def test_trained_masked_and_sped_up(name):
    pruner, this, log = make(name, budget=Budget(macs=0.6))
    model, masks = pruner.compress(max_steps=10, max_epochs=None)
    assert len(log.losses) == 10 and model is pruner.bound_model
    assert [s.iteration for s in pruner.history] == [2, 6]
    assert pruner.plan.cost.macs <= 0.6 * this.cost.dense.macs and not pruner.plan.is_noop
    assert pruner.plan.cost.as_dict() == pruner.history[-1].cost
    assert set(pruner.left_out) == LEFT_OUT.get(name, set())
    assert_masked_is_removed(pruner, masks, this)
    assert not hooks(model)


def test_the_masks_are_those_of_the_soft_phase():
    """NNI's masks on the producers compute what the gates on the consumers did."""
    pruner, this, _ = make(budget=Budget(macs=0.5))
    seen = []
    close = pruner._fresh().close

    def closing(soft):
        model = pruner.bound_model.eval()
        seen.append(output(model, this.x))
        close.__func__(soft)

    pruner._soft.__class__.close, original = closing, pruner._soft.__class__.close
    try:
        model, masks = pruner.compress(max_steps=10, max_epochs=None)
    finally:
        type(pruner._soft).close = original
    torch.testing.assert_close(output(model.eval(), this.x), seen[0], rtol=1e-4, atol=1e-5)
    for group in this.groups:
        assert removed_filters(masks, group.name) == int(pruner._soft.masked[group.name].sum())


def test_the_same_as_through_torch_pruning():
    """Same loop, same batches, same masks."""
    pruner, this, _ = make(config=CONVS, budget=Budget(macs=0.5))
    pruner.compress(max_steps=12, max_epochs=None)
    model = copy.deepcopy(this.model).train()
    reference = Reference(model, this.x, budget=Budget(macs=0.5), schedule=SCHEDULE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    reference.start(optimizer, total_steps=12)
    for i in range(12):
        x, y = this.loader[i % len(this.loader)]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        reference.step()
    assert pruner._soft.removed == reference.masked
    assert [r.restored for s in pruner.history for r in s.rows] == [
        r.restored for s in reference.history for r in s.rows
    ]
    for ours, theirs in zip(pruner.history, reference.history, strict=True):
        assert ours.cost == theirs.cost
        assert [r.sparsity for r in ours.rows] == pytest.approx([r.sparsity for r in theirs.rows], abs=2e-3)


def test_ratios_become_a_budget():
    pruner, this, _ = make("plain")
    pruner.compress(max_steps=10, max_epochs=None)
    limit = this.cost.cost({"0.0": 4, "1.0": 6, "2.0": 8}).macs
    assert pruner.history[-1].limits == {"macs": limit} and pruner.plan.cost.macs <= limit


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20])
@pytest.mark.filterwarnings("ignore:.*have room for")
def test_any_number_of_steps(steps):
    pruner, this, log = make(budget=Budget(macs=0.5))
    _, masks = pruner.compress(max_steps=steps, max_epochs=None)
    assert len(log.losses) == steps and pruner.plan.cost.macs <= 0.5 * this.cost.dense.macs
    assert_masked_is_removed(pruner, masks, this)


def test_epochs():
    pruner, _, log = make(budget=Budget(macs=0.5), loader=case("residual").loader)
    pruner.compress(max_steps=None, max_epochs=3)
    assert len(log.losses) == 12 == pruner._soft._total
    pruner, _, _ = make(budget=Budget(macs=0.5), total_steps=12)
    pruner.compress(max_steps=None, max_epochs=3)
    assert pruner._soft._total == 12
    pruner, _, _ = make(budget=Budget(macs=0.5))
    with pytest.raises(ValueError, match="total_steps="):
        pruner.compress(max_steps=None, max_epochs=3)
    assert not hooks(pruner.bound_model) and pruner.evaluator.model is None
    pruner.compress(max_steps=8, max_epochs=None)  # and then it works


def test_a_training_that_ends_early_is_concluded():
    pruner, this, _ = make(budget=Budget(macs=0.5), total_steps=100)
    with pytest.warns(UserWarning, match="ended early .prune step 0 of 2, after 6 of 100"):
        _, masks = pruner.compress(max_steps=6, max_epochs=None)
    assert pruner.plan.cost.macs <= 0.5 * this.cost.dense.macs
    assert_masked_is_removed(pruner, masks, this)


def test_fused_with_a_distiller():
    this, log, taught = case("residual"), TrainingLog(), []
    model = copy.deepcopy(this.model)

    def teach(batch, teacher):
        taught.append(len(batch[0]))
        return teacher(batch[0])

    config = [{"op_types": ["Linear"], "lambda": 0.1, "apply_method": "mse"}]
    evaluator = make_evaluator(model, this.loader, log)
    distiller = DynamicLayerwiseDistiller(model, config, evaluator, copy.deepcopy(this.model), teach)
    options = {"budget": Budget(macs=0.5), "example_inputs": this.x, "schedule": SCHEDULE}
    pruner = PSAPPruner.from_compressor(distiller, CONVS, **options)
    _, masks = pruner.compress(max_steps=10, max_epochs=None)
    assert len(taught) == len(log.losses) == 10
    assert pruner.plan.cost.macs <= 0.5 * this.cost.dense.macs
    assert_masked_is_removed(pruner, masks, this)


def test_what_trains_is_what_is_wrapped():
    pruner, this, _ = make(budget=Budget(macs=0.5))
    pruner.compress(max_steps=10, max_epochs=None)
    pruner.unwrap_model()
    moved = [n for n, p in pruner.bound_model.named_parameters() if not torch.equal(p, this.model.get_parameter(n))]
    assert len(moved) == len(list(this.model.parameters()))


def test_a_second_compress_starts_afresh():
    pruner, _, _ = make(budget=Budget(macs=0.5))
    pruner.compress(max_steps=8, max_epochs=None)
    first = pruner.get_masks()
    pruner.compress(max_steps=8, max_epochs=None)
    assert len(pruner.history) == 2
    again, _, _ = make(budget=Budget(macs=0.5))
    again.compress(max_steps=8, max_epochs=None)
    assert_same_masks(first, again.get_masks())  # deterministic
    gc.collect()


def test_a_training_that_fails_leaves_no_hooks():
    this = case("residual")
    model = copy.deepcopy(this.model)

    def train(model, optimizer, training_step, *_, **__):
        training_step(this.loader[0], model).backward()
        optimizer.step()
        raise KeyError("disk on fire")

    from nni.compression import TorchEvaluator

    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.05)
    evaluator = TorchEvaluator(train, optimizer, lambda b, m: torch.nn.functional.cross_entropy(m(b[0]), b[1]))
    pruner = PSAPPruner(model, CONVS, evaluator, budget=Budget(macs=0.5), example_inputs=this.x)
    with pytest.raises(KeyError, match="disk on fire"):
        pruner.compress(max_steps=30, max_epochs=None)
    assert not hooks(model) and evaluator.model is None
    pruner.unwrap_model()
    assert not wrappers(model)


def test_refused():
    this = case("residual")
    model = copy.deepcopy(this.model)
    before = Snapshot(model)
    for options, error, message in (
        ({"budget": Budget(macs=0.5)}, ValueError, "example inputs are missing"),
        ({"budget": Budget(macs=0.001), "example_inputs": this.x}, BudgetError, "cannot be reached"),
        ({"budget": Budget(macs=0.5), "example_inputs": this.x, "ratios": "best"}, ValueError, "ratios="),
        ({"example_inputs": this.x}, ValueError, "sparse_ratio"),
    ):
        with pytest.raises(error, match=message):
            PSAPPruner(model, CONVS, **options)
        before.check()
    pruner = PSAPPruner(model, CONVS, budget=Budget(macs=0.5), example_inputs=this.x)
    with pytest.raises(ValueError, match="evaluator"):
        pruner.compress(max_steps=3)
    pruner, _, _ = make(budget=Budget(macs=0.5))
    with pytest.raises(ValueError, match="how long"):
        pruner.compress()
    pruner, _, _ = make("plain")
    schedule = AGPPruner(pruner, interval_steps=2, total_times=3)
    with pytest.raises(RuntimeError, match="own schedule"):
        schedule.compress(max_steps=8, max_epochs=None)


def test_pruned_network_costs_what_the_history_says():
    pruner, this, _ = make(budget=Budget(params=0.5))
    _, masks = pruner.compress(max_steps=10, max_epochs=None)
    pruner.unwrap_model()
    small = speedup(pruner.bound_model, this.x, masks)
    assert Cost(*count_ops(small, this.x)).as_dict() == pruner.history[-1].cost
    assert prunable_groups(small, this.x).widths == {r.group: r.width for r in pruner.history[-1].rows}


def test_progress_names_the_training_and_its_prune_steps(capfd):
    make(budget=Budget(macs=0.6), progress=True)[0].compress(max_steps=10, max_epochs=None)
    err = capfd.readouterr().err
    assert [p for p in ("tracing", "verifying", "training", "10/10", "prune step 1 of 2") if p not in err] == []
    make(budget=Budget(macs=0.6))[0].compress(max_steps=10, max_epochs=None)
    assert "training" not in capfd.readouterr().err
