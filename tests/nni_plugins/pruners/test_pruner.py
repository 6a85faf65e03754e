"""NNI's contract of pruners, their budgets, options and data."""

import copy
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

nni = pytest.importorskip("nni")

from nni.compression.pruning import L1NormPruner  # noqa: E402
from nni.compression.quantization import QATQuantizer  # noqa: E402

from helpers.nni_catro_cases import CONVS, catro, widths  # noqa: E402
from nni_plugins import CATROPruner, ImportancePruner, OBSPruner, speedup  # noqa: E402
from nni_plugins.testing import (  # noqa: E402
    NNIPrunerContract,
    TrainingLog,
    assert_same_masks,
    case,
    make_evaluator,
    output,
    removed_filters,
    wrappers,
)
from nni_plugins.testing.cases import HALF  # noqa: E402
from tp_importance import Budget, BudgetError, CATROImportance, LatencyTable, count_ops  # noqa: E402
from tp_importance.budget import Cost  # noqa: E402
from tp_importance.latency.measure import Latency  # noqa: E402
from tp_importance.testing import Snapshot  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


class TestCATROPruner(NNIPrunerContract):
    pruner_class = CATROPruner


class TestOBSPruner(NNIPrunerContract):
    pruner_class = OBSPruner


class TestChannelSpace(NNIPrunerContract):
    """Any importance does: the literal form of CATRO, through the general class."""

    def make(self, model, config_list, evaluator=None, *, loader, budget=None, **options):
        importance = CATROImportance(space="channel")
        return ImportancePruner(
            model, config_list, evaluator, loader=loader, budget=budget, importance=importance, **options
        )

    test_generated_metrics_and_masks_keep_their_dimensions = None  # its best sets are not nested: no metric ranks them
    # what does not hang on the importance is not tried twice
    test_half_precision = test_batches_of_two_inputs_and_of_keywords = test_explicit_example_inputs = None
    test_schedule = test_fused_with_a_distiller = test_fused_and_scheduled = test_fused_with_a_quantizer = None


# -- budgets


def test_with_a_budget_the_ratio_may_be_left_out():
    kept = widths("residual", budget=Budget(macs=0.5))
    assert widths("residual", [{"op_types": ["Conv2d"]}], budget=Budget(macs=0.5)) == kept
    with pytest.raises(ValueError, match=r"sparse_ratio=0\.0 together with a budget"):
        catro(config_list=[{**CONVS, "sparse_ratio": 0.0}], budget=Budget(macs=0.5))


def test_unreachable_budget_fails_before_anything_is_trained():
    model = copy.deepcopy(case("plain").model)
    before = Snapshot(model)
    with pytest.raises(BudgetError, match=r"22124 macs cannot be reached.* 134832 macs are left"):
        CATROPruner(model, [{**CONVS, "max_sparse_ratio": 0.25}], loader=case("plain").loader, budget=Budget(macs=0.1))
    before.check()
    assert widths(config_list=[{**CONVS, "max_sparse_ratio": 0.25}], budget=Budget(macs=134832)) == {
        "0.0": 6,
        "1.0": 9,
        "2.0": 12,
    }


def test_budget_of_a_partial_selection_counts_the_whole_network():
    pruner = catro(config_list=[{"op_names": ["1.0"]}], budget=Budget(macs=0.8))
    pruner.compress()
    assert pruner.plan.dense == case("plain").cost.dense
    assert pruner.plan.cost.macs <= 0.8 * pruner.plan.dense.macs
    assert pruner.plan.widths.keys() == {"1.0"}


@pytest.mark.parametrize("budget", [0.5, {"macs": 0.5}])
def test_budget_must_be_a_budget(budget):
    with pytest.raises(TypeError, match="budget must be a Budget"):
        catro(budget=budget)


# -- options of the method and of the planner


@pytest.mark.parametrize("options", [{"seed": 3, "positions": 2}, {"space": "channel"}, {"class_weight": 1.0}])
def test_same_seed_same_masks(options):
    assert_same_masks(catro(**options).compress()[1], catro(**options).compress()[1])


def test_classes_select_a_subtask():
    x, y = map(torch.cat, zip(*case("plain").loader, strict=True))
    mine = (y == 0) | (y == 2)
    _, masks = catro(classes=[0, 2], positions=None).compress()
    _, filtered = catro(loader=[(x[mine], y[mine])], positions=None).compress()
    _, other = catro(positions=None).compress()
    assert_same_masks(masks, filtered)
    assert any(not torch.equal(masks[n]["weight"], other[n]["weight"]) for n in masks)


def test_options_of_the_planner(capsys):
    assert widths(config_list=[{**CONVS, "sparse_ratio": 0.4}], round_to=4) == {"0.0": 8, "1.0": 8, "2.0": 12}
    assert widths(max_pruning_ratio=0.25) == {"0.0": 6, "1.0": 9, "2.0": 12}
    capped = [{**CONVS, "max_sparse_ratio": 0.75}]
    assert widths(config_list=capped, max_pruning_ratio={"1.0": 0.25}) == {"0.0": 4, "1.0": 9, "2.0": 8}
    assert "collecting" not in capsys.readouterr().err
    even = widths(allocator="uniform", budget=Budget(macs=0.5), progress=True)
    assert max(even[g.name] / g.width for g in case("plain").groups) < 0.9
    assert "collecting" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["pruning_ratio", "ignored_layers"])
def test_unknown_option(option):
    with pytest.raises(TypeError, match=option):
        catro(**{option: 0.5})


@pytest.mark.parametrize("options", [{"round_to": 0}, {"max_pruning_ratio": 2.0}, {"space": "pixel"}])
def test_bad_option(options):
    model = copy.deepcopy(case("plain").model)
    before = Snapshot(model)
    with pytest.raises(ValueError, match=f"{next(iter(options))}="):
        CATROPruner(model, [CONVS], loader=case("plain").loader, **options)
    before.check()


# -- data


def test_unlabelled_batches_and_label_fn():
    batches = [x for x, _ in case("plain").loader]
    labels = {id(x): y for x, y in case("plain").loader}
    with pytest.raises(ValueError, match="gives no labels"):
        catro(loader=batches).compress()
    _, masks = catro(loader=batches, label_fn=lambda x: labels[id(x)]).compress()
    assert_same_masks(masks, catro().compress()[1])


def test_batches_of_another_form():
    batches = [("file name", {"image": x}, y) for x, y in case("plain").loader]
    with pytest.raises(TypeError, match="forward_fn"):
        catro(loader=batches)
    forms = {"forward_fn": lambda model, batch: model(batch[1]["image"]), "label_fn": lambda batch: batch[2]}
    _, masks = catro(loader=batches, **forms).compress()
    assert_same_masks(masks, catro().compress()[1])


def test_tensors_without_a_batch_dimension_are_passed_on():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = copy.deepcopy(case("plain").model)

        def forward(self, x, scale):
            return self.net(x * scale)

    loader = [{"x": x, "scale": torch.tensor(2.0), "labels": y} for x, y in case("plain").loader]
    pruner = CATROPruner(Scaled(), [CONVS], loader=loader)
    pruner.compress()
    assert pruner.plan.widths == {"net.0.0": 4, "net.1.0": 6, "net.2.0": 8}


@pytest.mark.parametrize(
    "loader, error, message",
    [([], ValueError, "no batch.*pass example_inputs="), (torch.zeros(2, 3, 16, 16), TypeError, "single Tensor")],
)
def test_bad_loader(loader, error, message):
    with pytest.raises(error, match=message):
        catro(loader=loader)


def test_error_of_the_loader_passes_unchanged():
    class Broken:
        error = OSError("disk on fire")

        def __iter__(self):
            raise self.error

    model = copy.deepcopy(case("plain").model)
    before = Snapshot(model)
    with pytest.raises(OSError) as caught:
        CATROPruner(model, [CONVS], loader=Broken())
    assert caught.value is Broken.error
    before.check()


def test_every_mask_generation_looks_at_the_data_once():
    class Counted:
        passes = 0

        def __iter__(self):
            self.passes += 1
            return iter(case("plain").loader)

    loader = Counted()
    pruner = catro(loader=loader, example_inputs=case("plain").x)
    ones = pruner.get_masks()
    assert loader.passes == 0
    _, masks = pruner.compress()
    assert loader.passes == 1
    pruner.update_masks(ones)
    with torch.no_grad():  # as if training had given up the channels that were kept
        pruner._module_wrappers["2.0"].weight.mul_(torch.where(masks["2.0"]["weight"] == 1, 1e-3, 1.0))
    _, again = pruner.compress()
    assert loader.passes == 2
    assert torch.equal(again["2.0"]["weight"], 1 - masks["2.0"]["weight"])


# -- other compressors


def test_wrapped_model_is_refused():
    pruner = catro()
    pruner.compress()
    wrapped = wrappers(pruner.bound_model)
    with pytest.raises(RuntimeError, match=r"still wrapped by NNI, at '0\.0\._nni_wrapper'; call unwrap_model\(\)"):
        CATROPruner(pruner.bound_model, [CONVS], loader=case("plain").loader)
    assert wrappers(pruner.bound_model) == wrapped
    pruner.unwrap_model()
    again = CATROPruner(pruner.bound_model, [CONVS], loader=case("plain").loader)
    assert_same_masks(again.compress()[1], pruner.get_masks())


def test_two_pruners_cannot_share_a_layer():
    model = copy.deepcopy(case("plain").model)
    other = L1NormPruner(model, [CONVS])
    wrapped = wrappers(model)
    with pytest.raises(ValueError, match=r"0\.0, 1\.0, 2\.0 already have masks of the other compressor"):
        CATROPruner.from_compressor(other, [CONVS], loader=case("plain").loader)
    assert wrappers(model) == wrapped
    assert other.compress()[1].keys() == {"0.0", "1.0", "2.0"}  # as if nothing had happened
    other.unwrap_model()


def test_two_pruners_share_a_network():
    log, this = TrainingLog(), case("plain")
    model = copy.deepcopy(this.model)
    other = L1NormPruner(model, [{"op_names": ["0.0"], "sparse_ratio": 0.25}], make_evaluator(model, this.loader, log))
    other.interval_steps = 1
    log.pruner = pruner = CATROPruner.from_compressor(
        other, [{"op_names": ["1.0", "2.0"], "sparse_ratio": 0.5}], loader=this.loader
    )
    _, masks = pruner.compress(max_steps=2, max_epochs=None)
    assert [removed_filters(masks, name) for name in ("0.0", "1.0", "2.0")] == [2, 6, 8]


def test_pruner_comes_first_in_a_fusion():
    log, this = TrainingLog(), case("plain")
    model = copy.deepcopy(this.model)
    log.pruner = pruner = CATROPruner(model, [CONVS], make_evaluator(model, this.loader, log), loader=this.loader)
    pruner.interval_steps = 2
    config = [{"op_types": ["Conv2d"], "target_names": ["weight"], "quant_dtype": "int8"}]
    quantizer = QATQuantizer.from_compressor(pruner, config)
    quantizer.compress(max_steps=4, max_epochs=None)
    assert log.masked == [0, 18, 18, 18]
    assert pruner.plan.widths == {"0.0": 4, "1.0": 6, "2.0": 8}


def test_fusion_takes_the_evaluator_given_and_needs_a_duration():
    log, this = TrainingLog(), case("plain")
    model = copy.deepcopy(this.model)
    other = L1NormPruner(model, [{"op_types": ["Linear"], "sparse_ratio": 0.25}])
    evaluator = make_evaluator(model, this.loader, log)
    pruner = CATROPruner.from_compressor(other, HALF, evaluator=evaluator, loader=this.loader)
    assert pruner.evaluator is evaluator
    with pytest.raises(AssertionError):  # NNI's own
        pruner.compress()
    pruner.compress(max_steps=1, max_epochs=None)
    assert len(log.losses) == 1


def test_without_an_evaluator_one_shot():
    pruner = catro()
    assert pruner.evaluator is None
    with pytest.raises(AssertionError, match="training aware"):  # NNI's own
        pruner.compress(max_steps=3)
    _, masks = pruner.compress()
    masked = output(pruner.bound_model, case("plain").x)
    pruner.unwrap_model()
    small = speedup(pruner.bound_model, case("plain").x, masks)
    assert torch.allclose(masked, output(small, case("plain").x), atol=1e-6)
    assert Cost(*count_ops(small, case("plain").x)) == pruner.plan.cost


# -- without NNI


def test_packages_without_a_working_nni(tmp_path):
    package = tmp_path / "nni"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    program = """
        import sys
        import tp_importance
        assert "nni" not in sys.modules

        def reason():
            try:
                import nni_plugins
            except ImportError as error:
                assert type(error).__name__ == "NNIUnavailableError", type(error)
                return str(error)
            raise AssertionError("imported")

        broken = reason()
        assert 'pip install "tp-importance[nni]"' in broken, broken
        assert "RuntimeError: operator torchvision::nms does not exist" in broken, broken
        sys.modules["nni"] = None  # what Python says if there is none
        missing = reason()
        assert 'pip install "tp-importance[nni]"' in missing and "ModuleNotFoundError" in missing, missing
    """
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(program)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr


def test_latency_budget_and_its_schedule():
    """By a clock that counts weights: masks follow the predicted latency, at once or on the way."""

    def measure(model, x, **_):
        alone = not list(model.children())
        return Latency((not alone) + sum(p.numel() for p in model.parameters()) / 1e3, 0.0, 1, 1, "fake", 1)

    options = {"latency_table": LatencyTable(measure=measure)}
    pruner = catro("plain", [{"op_types": ["Conv2d"]}], budget=Budget(latency=0.6), **options)
    pruner.compress()
    found = pruner.plan.latency_ms
    assert 0 < found.predicted <= found.limit == 0.6 * found.dense
    cost = pruner._target.cost_model
    dense = cost.timed.predict(cost.full)
    assert pruner._budget_at(0.5).latency_ms == pytest.approx(dense - 0.5 * (dense - found.limit))
    with pytest.raises(BudgetError, match=r"latency_ms are predicted.*select more layers"):
        catro("plain", [{"op_names": ["1.0"]}], budget=Budget(latency=0.05), **options)
