"""ResConv through NNI: what speedup makes of its masks."""

import pytest
import torch

nni = pytest.importorskip("nni")

from nni.compression.speedup import ModelSpeedup  # noqa: E402
from nni.compression.speedup.error_code import EmptyLayerError  # noqa: E402

from helpers.nni_resconv_cases import CONVS, HALF, LOADER, MARKS, assert_sped_up, network, pruner_of  # noqa: E402
from nni_plugins import CATROPruner, ResConvPruner, speedup  # noqa: E402
from nni_plugins.testing import output, relative_error  # noqa: E402
from tp_importance import count_ops  # noqa: E402
from tp_importance.methods.resconv import resconv_layers  # noqa: E402
from tp_importance.methods.resconv.block import ResConv2d  # noqa: E402
from tp_importance.testing import Snapshot  # noqa: E402

pytestmark = MARKS


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
        ({"nope": {"weight": torch.ones(8)}}, ValueError, "nope"),
        ([1], TypeError, "masks are of type list"),
    ],
)
def test_bad_masks(masks, error, message):
    pruner, x = pruner_of()
    pruner.unwrap_model()
    before = Snapshot(pruner.bound_model.train())
    with pytest.raises(error, match=message):
        speedup(pruner.bound_model, x, masks)
    before.check()
    assert before.model is pruner.bound_model


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
    before = Snapshot(model)

    def broken(layer):
        raise OSError("no memory")

    monkeypatch.setattr(ResConv2d, "fused", broken)
    with pytest.raises(OSError, match="no memory"):
        speedup(model, x, {"1.0": {"s": torch.zeros(1)}})
    before.check()


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
