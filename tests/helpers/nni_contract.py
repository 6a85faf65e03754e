"""What every NNI pruner of this package keeps: inherit :class:`NNIPrunerContract` and say how to make the pruner."""

import copy
import io
import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

nni = pytest.importorskip("nni")

from nni.compression import TorchEvaluator  # noqa: E402
from nni.compression.distillation import DynamicLayerwiseDistiller  # noqa: E402
from nni.compression.pruning import AGPPruner, LinearPruner  # noqa: E402
from nni.compression.quantization import QATQuantizer  # noqa: E402

from helpers.networks import NUM_CLASSES, class_loader, make_network  # noqa: E402
from nni_plugins import ImportancePruner, speedup  # noqa: E402
from tp_importance import Budget, Cost, CostModel, PrunableGroups, count_ops, prunable_groups  # noqa: E402
from tp_importance.core.guards import HOOKS  # noqa: E402

Config = list[dict[str, Any]]
Masks = dict[str, dict[str, Tensor]]

ALL_LAYERS = ["Conv2d", "ConvTranspose2d", "Linear"]
HALF: Config = [{"op_types": ALL_LAYERS, "sparse_ratio": 0.5}]

BUDGETS = {
    "macs": Budget(macs=0.5),
    "params": Budget(params=0.5),
    "both": Budget(macs=0.6, params=0.55),
}

LEFT_OUT = {"transformer_mlp": {"embed"}, "padded_shortcut": {"features.0.0"}}
"""Groups that cannot be pruned exactly: normalised over channels, or mistraced by Torch-Pruning."""


@dataclass(frozen=True)
class Case:
    """A network, its inputs, data, groups and cost; shared between tests: prune a copy."""

    model: nn.Module
    x: Tensor
    loader: list[tuple[Tensor, Tensor]]
    groups: PrunableGroups
    cost: CostModel


@cache
def case(name: str) -> Case:
    model, x = make_network(name)
    groups = prunable_groups(model, x)
    return Case(model, x, class_loader(shape=tuple(x.shape[1:])), groups, CostModel.from_groups(groups))


@contextmanager
def warns_of_what_is_left_out(name: str) -> Iterator[None]:
    if name in LEFT_OUT:
        with pytest.warns(UserWarning, match="left alone, though selected"):
            yield
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            yield


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def output(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def relative_error(masked: Tensor, small: Tensor) -> float:
    return float((masked - small).abs().max() / masked.abs().max())


def hooks(model: nn.Module) -> int:
    return sum(len(getattr(module, key)) for module in model.modules() for key in HOOKS)


def wrappers(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules() if name.endswith("_nni_wrapper")]


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Values, parameter objects, modes, hooks and instance attributes: everything NNI or a pruner could touch."""
    state: dict[str, Any] = {f"value of {k}": v.clone() for k, v in model.state_dict().items()}
    state |= {f"parameter {n}": (id(p), p.requires_grad) for n, p in model.named_parameters()}
    state |= {f"module {n}": (id(m), m.training, sorted(vars(m))) for n, m in model.named_modules()}
    return state | {"hooks": hooks(model)}


def assert_unchanged(before: dict[str, Any], model: nn.Module) -> None:
    after = snapshot(model)
    assert before.keys() == after.keys()
    for key, value in before.items():
        same = torch.equal(value, after[key]) if isinstance(value, Tensor) else value == after[key]
        assert same, key


def assert_same_masks(one: Masks, other: Masks) -> None:
    assert one.keys() == other.keys()
    for name, targets in one.items():
        assert targets.keys() == other[name].keys()
        for target, mask in targets.items():
            same = mask is other[name][target] if mask is None else torch.equal(mask, other[name][target])
            assert same, f"{name}.{target}"


def removed_filters(masks: Masks, name: str) -> int:
    return int((masks[name]["weight"].flatten(1) == 0).all(1).sum())


def assert_budget_rule(pruner: ImportancePruner, budget: Budget, this: Case) -> None:
    """The cost keeps every limit, and not one more unit of any group would fit."""
    limits = budget.limits(this.cost.dense)
    assert all(getattr(pruner.plan.cost, f) <= limit for f, limit in limits.items())
    assert pruner.plan.cost == this.cost.cost(pruner.plan.widths)
    for group in this.groups:
        if pruner.plan.widths[group.name] < group.width:
            more = {**pruner.plan.widths, group.name: pruner.plan.widths[group.name] + group.unit_size}
            assert any(getattr(this.cost.cost(more), f) > limit for f, limit in limits.items()), group.name


def assert_masked_is_removed(pruner: ImportancePruner, masks: Masks, this: Case, wrapped_by: Any = None) -> None:
    """The masked model, sped up, computes the same and costs what was planned."""
    model = pruner.bound_model.eval()
    masked = output(model, this.x)
    (wrapped_by or pruner).unwrap_model()
    speedup(model, this.x, masks)
    assert relative_error(masked, output(model, this.x)) <= 1e-5
    assert Cost(*count_ops(model, this.x)) == pruner.plan.cost
    assert pruner.plan.cost.macs < this.cost.dense.macs and pruner.plan.cost.params < this.cost.dense.params


def training_step(batch: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


@dataclass
class TrainingLog:
    """What was seen after every optimizer step."""

    losses: list[float] = field(default_factory=list)
    hooks: list[int] = field(default_factory=list)
    costs: list[Cost | None] = field(default_factory=list)
    masked: list[int] = field(default_factory=list)
    pruner: ImportancePruner | None = None


def make_evaluator(model: nn.Module, loader: Iterable[Any], log: TrainingLog) -> TorchEvaluator:
    """A training loop as a user writes it, that also fills ``log``."""

    def train(model, optimizer, training_step, lr_scheduler=None, max_steps=None, max_epochs=None):
        model.train()
        steps = 0
        for _ in range(max_epochs or 100):
            for batch in loader:
                if max_steps is not None and steps >= max_steps:
                    return
                optimizer.zero_grad()
                loss = training_step(batch, model)
                loss.backward()
                optimizer.step()
                steps += 1
                log.losses.append(float(loss.detach()))
                log.hooks.append(hooks(model))
                if log.pruner is not None:
                    log.costs.append(log.pruner.plan and log.pruner.plan.cost)
                    masks = log.pruner.get_masks()
                    log.masked.append(sum(removed_filters(masks, g.name) for g in log.pruner._planner.groups))

    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.05, momentum=0.9)
    return TorchEvaluator(train, optimizer, training_step)


class NNIPrunerContract:
    """Inherit, set ``pruner_class`` or override ``make_pruner`` (and ``fuse_pruner``), and every test runs."""

    pruner_class: type[ImportancePruner]
    options: ClassVar[dict[str, Any]] = {}

    def make_pruner(
        self,
        model: nn.Module,
        config_list: Config,
        evaluator: Any = None,
        *,
        loader: Iterable[Any],
        budget: Budget | None = None,
        **options: Any,
    ) -> ImportancePruner:
        options = {**self.options, **options}
        return self.pruner_class(model, config_list, evaluator, loader=loader, budget=budget, **options)

    def fuse_pruner(
        self, compressor: Any, config_list: Config, *, loader: Iterable[Any], budget: Budget | None = None
    ) -> ImportancePruner:
        return self.pruner_class.from_compressor(compressor, config_list, loader=loader, budget=budget, **self.options)

    def pruner_of(self, name: str, config_list: Config = HALF, **options: Any) -> tuple[ImportancePruner, Case]:
        """The pruner of a copy of a network, and the case it was copied from."""
        this = case(name)
        with warns_of_what_is_left_out(name):
            pruner = self.make_pruner(copy.deepcopy(this.model), config_list, **{"loader": this.loader, **options})
        return pruner, this

    @pytest.fixture(autouse=True)
    def one_thread(self):
        """On networks this small a second thread only waits, for long if the cores are busy."""
        with threads(1):
            yield

    # -- masked = removed, at the planned cost

    @pytest.mark.parametrize(
        "name",
        [
            *("residual", "concat", "dense", "depthwise", "grouped", "split", "flatten", "se", "shared_input"),
            *("transposed", "transformer_mlp", "padded_shortcut", "no_bn", "preact"),
        ],
    )
    def test_by_ratio_the_sped_up_model_computes_what_the_masked_one_did(self, name):
        pruner, this = self.pruner_of(name)
        dense = output(this.model, this.x)
        model, masks = pruner.compress()
        assert model is pruner.bound_model
        assert relative_error(dense, output(model, this.x)) > 1e-3
        assert set(pruner.left_out) == LEFT_OUT.get(name, set())
        assert pruner.plan.widths == {g.name: g.width - g.n_units // 2 * g.unit_size for g in this.groups}
        assert_masked_is_removed(pruner, masks, this)

    @pytest.mark.parametrize(
        "name, goal",
        [
            *(("residual", "macs"), ("residual", "params"), ("residual", "both"), ("grouped", "macs")),
            *(("depthwise", "both"), ("dense", "params"), ("transposed", "macs"), ("transformer_mlp", "params")),
        ],
    )
    def test_to_a_budget_the_sped_up_model_costs_what_was_planned(self, name, goal):
        pruner, this = self.pruner_of(name, budget=BUDGETS[goal])
        _, masks = pruner.compress()
        assert_budget_rule(pruner, BUDGETS[goal], this)
        assert pruner.plan.limits == BUDGETS[goal].limits(this.cost.dense)
        assert_masked_is_removed(pruner, masks, this)

    def test_absolute_budget(self):
        budget = Budget(macs=case("residual").cost.dense.macs * 2 // 3)
        pruner, this = self.pruner_of("residual", budget=budget)
        pruner.compress()
        assert_budget_rule(pruner, budget, this)

    def test_coupled_layers_lose_the_same_channels(self):
        pruner, this = self.pruner_of("residual")
        _, masks = pruner.compress()
        for group in this.groups:
            kept = [masks[m.name]["weight"].reshape(m.width, -1).any(1) for m in group.members if m.role == "out"]
            assert len(kept) >= 2  # a batch norm at least
            assert all(torch.equal(kept[0], other) for other in kept)

    # -- NNI's interface

    def test_compress_leaves_the_model_wrapped_and_unwrap_restores_it(self):
        pruner, this = self.pruner_of("residual")
        values = copy.deepcopy(this.model.state_dict())
        result = pruner.compress()
        assert isinstance(result, tuple) and len(result) == 2
        assert wrappers(pruner.bound_model)
        pruner.unwrap_model()
        assert not wrappers(pruner.bound_model) and not hooks(pruner.bound_model)
        assert all(torch.equal(v, values[k]) for k, v in pruner.bound_model.state_dict().items())
        assert torch.equal(output(pruner.bound_model, this.x), output(this.model, this.x))

    def test_generated_metrics_and_masks_keep_their_dimensions(self):
        pruner, this = self.pruner_of("transposed")
        metrics = pruner._calculate_metrics(pruner._collect_data())
        masks = pruner.generate_masks()
        for group in this.groups:
            for member in group.producers:
                shape = (1, 12, 1, 1) if member.name == "up.0" else (member.width, 1, 1, 1)
                assert metrics[member.name]["weight"].shape == masks[member.name]["weight"].shape == shape
                assert set(masks[member.name]["weight"].unique().tolist()) <= {0.0, 1.0}
                metric, keep = metrics[member.name]["weight"].flatten(), masks[member.name]["weight"].flatten() == 1
                assert metric[~keep].max() < metric[keep].min()  # smaller goes first
                assert len(metric.unique()) == member.width
        assert masks["up.1"]["weight"].shape == masks["up.1"]["bias"].shape == (12,)

    def test_get_and_update_masks(self):
        pruner, this = self.pruner_of("residual")
        ones = pruner.get_masks()
        assert all(
            bool((mask == 1).all()) for targets in ones.values() for mask in targets.values() if mask is not None
        )
        model, masks = pruner.compress()
        assert_same_masks(masks, pruner.get_masks())
        masked = output(model, this.x)
        pruner.update_masks(ones)
        assert torch.equal(output(model, this.x), output(this.model, this.x))
        assert any(bool((mask == 0).any()) for mask in masks["0.0"].values() if mask is not None)  # they are copies
        pruner.update_masks(masks)
        assert torch.equal(output(model, this.x), masked)

    def test_masks_survive_a_safe_file(self):
        pruner, this = self.pruner_of("residual")
        _, masks = pruner.compress()
        file = io.BytesIO()
        torch.save(masks, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        assert_same_masks(masks, loaded)
        assert_masked_is_removed(pruner, loaded, this)

    def test_compressing_again_changes_nothing(self):
        pruner, _ = self.pruner_of("residual")
        _, masks = pruner.compress()
        _, again = pruner.compress()
        assert_same_masks(masks, again)

    def test_wrapped_model_remains_an_ordinary_model(self):
        pruner, this = self.pruner_of("residual")
        model, _ = pruner.compress()
        assert not any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers()))
        masked = output(model, this.x)
        model.load_state_dict(copy.deepcopy(model.state_dict()))
        assert torch.equal(output(model, this.x), masked)

    def test_pruning_a_sped_up_model_once_more(self):
        pruner, this = self.pruner_of("residual")
        model, masks = pruner.compress()
        pruner.unwrap_model()
        speedup(model, this.x, masks)
        first = pruner.plan
        second = self.make_pruner(model, HALF, loader=this.loader)
        _, masks = second.compress()
        assert second.plan.dense == first.cost
        assert_masked_is_removed(second, masks, this)

    # -- leaving things as they were

    def test_modes_flags_hooks_data_and_random_state_are_left_alone(self):
        this = case("residual")
        model = copy.deepcopy(this.model).train()
        model[1].eval()
        model[2].requires_grad_(False)
        seen = []
        model[0].register_forward_hook(lambda *_: seen.append(1))
        modes = {name: module.training for name, module in model.named_modules()}
        flags = {name: p.requires_grad for name, p in model.named_parameters()}
        statistics = {name: b.clone() for name, b in model.named_buffers()}
        config, state = copy.deepcopy(HALF), torch.get_rng_state()
        pruner = self.make_pruner(model, config, loader=this.loader)
        pruner.compress()
        assert {n: m.training for n, m in model.named_modules() if "_nni_wrapper" not in n} == modes
        assert hooks(model) == 1
        assert config == HALF
        assert torch.equal(torch.get_rng_state(), state)
        pruner.unwrap_model()
        assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
        assert all(torch.equal(b, statistics[name]) for name, b in model.named_buffers())

    def test_same_data_same_masks(self):
        first, _ = self.pruner_of("residual")
        _, masks = first.compress()
        torch.rand(7)
        second, _ = self.pruner_of("residual")
        assert_same_masks(masks, second.compress()[1])

    def test_frozen_model(self):
        this = case("residual")
        model = copy.deepcopy(this.model).requires_grad_(False)
        pruner = self.make_pruner(model, HALF, loader=this.loader)
        with torch.no_grad():
            _, masks = pruner.compress()
        assert pruner.plan.widths["0.0"] == 4
        assert_masked_is_removed(pruner, masks, this)
        assert not any(p.requires_grad for p in model.parameters())

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision(self, dtype):
        this = case("plain")
        model = copy.deepcopy(this.model).to(dtype)
        pruner = self.make_pruner(model, HALF, loader=this.loader)
        _, masks = pruner.compress()
        assert masks["0.0"]["weight"].dtype == dtype
        masked = output(model, this.x.to(dtype)).float()
        pruner.unwrap_model()
        small = output(speedup(model, this.x, masks), this.x.to(dtype)).float()
        assert relative_error(masked, small) <= 10 * torch.finfo(dtype).eps
        assert pruner.plan.cost == Cost(*count_ops(model, this.x.to(dtype)))

    def test_error_while_collecting_leaves_the_masks_alone(self):
        class Broken:
            error = OSError("disk on fire")

            def __iter__(self):
                yield case("residual").loader[0]
                raise self.error

        pruner, this = self.pruner_of("residual", loader=Broken())
        model = pruner.bound_model.train()
        ones, wrapped = pruner.get_masks(), wrappers(model)
        with pytest.raises(OSError) as caught:
            pruner.compress()
        assert caught.value is Broken.error
        assert wrappers(model) == wrapped and pruner.plan is None
        assert not hooks(model) and all(module.training for module in model.modules())
        assert_same_masks(pruner.get_masks(), ones)
        pruner.unwrap_model()
        assert torch.equal(output(model.eval(), this.x), output(this.model, this.x))

    def test_error_of_the_constructor_leaves_the_model_alone(self):
        this = case("residual")
        model = copy.deepcopy(this.model).train()
        before = snapshot(model)
        uneven = [{"op_names": ["0.0"], "sparse_ratio": 0.25}, *HALF]
        for config_list, options in ((uneven, {}), (HALF, {"budget": Budget(macs=1)}), (HALF, {"no_option": 1})):
            with pytest.raises((ValueError, TypeError)):
                self.make_pruner(model, config_list, loader=this.loader, **options)
            assert_unchanged(before, model)

    # -- schedules

    @pytest.mark.parametrize("budget", [None, Budget(macs=0.4)], ids=["ratio", "budget"])
    @pytest.mark.parametrize("scheduler", [LinearPruner, AGPPruner])
    def test_schedule(self, scheduler, budget):
        log, times = TrainingLog(), 4
        this = case("residual")
        model = copy.deepcopy(this.model)
        evaluator = make_evaluator(model, this.loader, log)
        log.pruner = pruner = self.make_pruner(model, HALF, evaluator, loader=this.loader, budget=budget)
        schedule = scheduler(pruner, interval_steps=2, total_times=times)
        _, masks = schedule.compress(max_steps=12, max_epochs=None)

        assert log.costs[0] is None and log.masked[0] == 0
        assert log.masked[1] > 0
        for k in range(1, times + 1):
            progress = k / times if scheduler is LinearPruner else 1 - (1 - k / times) ** 3
            if budget is None:
                gone = {g.name: int(progress * 0.5 * g.n_units) for g in this.groups}
                assert log.masked[2 * k - 1] == sum(gone.values())
            else:
                dense, limit = this.cost.dense.macs, budget.limits(this.cost.dense)["macs"]
                assert log.costs[2 * k - 1].macs <= math.ceil(dense - progress * (dense - limit))
        costs = [cost.macs for cost in log.costs if cost is not None]
        assert costs == sorted(costs, reverse=True) and costs[0] > costs[-1]
        assert log.masked[7:] == [log.masked[-1]] * 5  # the goal is reached, and kept while training goes on

        if budget is None:
            assert all(removed_filters(masks, g.name) == g.n_units // 2 for g in this.groups)
        else:
            assert_budget_rule(pruner, budget, this)
        assert sum(log.losses[-4:]) < sum(log.losses[:4])
        assert set(log.hooks) == {0} and not hooks(model) and not evaluator.get_all_hooks()
        schedule.unwrap_model()
        moved = {n: p for n, p in model.named_parameters() if not torch.equal(p, this.model.get_parameter(n))}
        assert len(moved) == len(list(model.parameters()))
        schedule.wrap_model()
        assert_masked_is_removed(pruner, masks, this, wrapped_by=schedule)

    # -- fusion

    def distiller(self, this: Case, log: TrainingLog) -> tuple[DynamicLayerwiseDistiller, list[int]]:
        """A distiller of a copy of the network, and the batches its teacher saw."""
        model, seen = copy.deepcopy(this.model), []

        def teach(batch, teacher):
            seen.append(len(batch[0]))
            return teacher(batch[0])

        config = [{"op_types": ["Linear"], "lambda": 0.1, "apply_method": "mse"}]
        evaluator = make_evaluator(model, this.loader, log)
        return DynamicLayerwiseDistiller(model, config, evaluator, copy.deepcopy(this.model), teach), seen

    @pytest.mark.parametrize("budget", [None, Budget(macs=0.5)], ids=["ratio", "budget"])
    def test_fused_with_a_distiller(self, budget):
        this, log = case("residual"), TrainingLog()
        distiller, taught = self.distiller(this, log)
        log.pruner = pruner = self.fuse_pruner(distiller, HALF, loader=this.loader, budget=budget)
        model, masks = pruner.compress(max_steps=6, max_epochs=None)
        assert model is distiller.bound_model
        assert len(taught) == len(log.losses) == 6
        assert log.masked[-1] == log.masked[0] > 0  # at once, as nothing says when
        assert set(log.hooks) == {0} and not hooks(model)
        if budget is not None:
            assert_budget_rule(pruner, budget, this)
        assert_masked_is_removed(pruner, masks, this)

    def test_fused_and_scheduled(self):
        this, log = case("residual"), TrainingLog()
        distiller, taught = self.distiller(this, log)
        log.pruner = pruner = self.fuse_pruner(distiller, HALF, loader=this.loader)
        schedule = LinearPruner(pruner, interval_steps=2, total_times=2)
        _, masks = schedule.compress(max_steps=None, max_epochs=2)
        assert len(taught) == 2 * len(this.loader) == len(log.masked)
        assert log.masked[0] == 0 < log.masked[1] < log.masked[3] == log.masked[-1]
        assert_masked_is_removed(pruner, masks, this, wrapped_by=schedule)

    def test_fused_with_a_quantizer(self):
        this, log = case("plain"), TrainingLog()
        model = copy.deepcopy(this.model)
        config = [{"op_types": ["Conv2d"], "target_names": ["_input_", "weight"], "quant_dtype": "int8"}]
        quantizer = QATQuantizer(model, config, make_evaluator(model, this.loader, log))
        log.pruner = pruner = self.fuse_pruner(quantizer, HALF, loader=this.loader)
        _, masks = pruner.compress(max_steps=6, max_epochs=None)
        assert log.masked == [4 + 6 + 8] * 6
        scales = [quantizer.get_calibration_config()[name]["weight"]["scale"] for name in ("0.0", "1.0", "2.0")]
        assert all(bool((scale > 0).all()) for scale in scales)
        quantized = output(model.eval(), this.x)
        pruner.unwrap_model()
        small = speedup(model, this.x, masks)
        assert Cost(*count_ops(small, this.x)) == pruner.plan.cost
        assert relative_error(quantized, output(small, this.x)) < 0.1  # 8 bits

    # -- data

    def test_batches_of_two_inputs_and_of_keywords(self):
        class Sum(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)
                self.fc = nn.Linear(8, NUM_CLASSES)

            def forward(self, a, b):
                return self.fc(F.relu(self.a(a) + self.b(b)).mean((2, 3)))

        torch.manual_seed(0)
        model = Sum()
        pairs = [((x, x.flip(0)), y) for x, y in class_loader(shape=(3, 6, 6))]
        keywords = [{"a": a, "b": b, "labels": y} for (a, b), y in pairs]
        masks = []
        for loader in (pairs, keywords):
            pruner = self.make_pruner(model, HALF, loader=loader)
            masks.append(pruner.compress()[1])
            pruner.unwrap_model()
            assert pruner.plan.widths == {"a": 4}
        assert_same_masks(*masks)

    def test_explicit_example_inputs(self):
        this = case("plain")
        x = this.x[:, :, :8, :8]
        pruner = self.make_pruner(copy.deepcopy(this.model), HALF, loader=this.loader, example_inputs=x)
        pruner.compress()
        assert pruner.plan.dense == Cost(*count_ops(this.model, x)) != this.cost.dense
