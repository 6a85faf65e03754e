"""The two engines of speedup: what our own removes where NNI's fails, and which one is taken."""

import copy
import logging
import sys
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm

nni = pytest.importorskip("nni")

from nni.compression.pruning import L1NormPruner  # noqa: E402

from helpers.logs import fresh_logging  # noqa: E402, F401 - a fixture
from helpers.nni_engine_cases import (  # noqa: E402
    Branching,
    Scaled,
    SharedHead,
    ShuffleNet,
    SuperResolution,
    Twice,
    ViT,
    channel_shuffle,
    convnext,
    dead_consumer,
    pixel_unshuffle,
)
from helpers.nni_speedup_cases import config_list, masked_output, masks_of, masks_of_units  # noqa: E402
from nni_plugins.surgery.speedup import speedup  # noqa: E402
from tp_importance import prunable_groups  # noqa: E402
from tp_importance.core.copies import copied  # noqa: E402
from tp_importance.graph.surgery import remove_units  # noqa: E402
from tp_importance.graph.verify import sample_units  # noqa: E402
from tp_importance.testing import Snapshot, make_network  # noqa: E402
from tp_importance.testing.networks import randomise_batchnorm  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")  # NNI's search for dependencies

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


pytestmark = pytest.mark.usefixtures("fresh_logging")


def built(kind: Callable[[], nn.Module], x: Tensor = X) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind()
    randomise_batchnorm(model, x)
    return model.eval()


def used(caplog: pytest.LogCaptureFixture) -> str:
    """The engine that the log names."""
    (line,) = (r.getMessage() for r in caplog.records if r.getMessage().startswith("removing channels:"))
    return line.rsplit("engine ", 1)[-1]


# Channels j, j + 4, j + 8, j + 12 of the stem: halves twice, and the shuffle brings each to one of the branch.
STREAM = {
    **{f"stem.{i}": [1, 5, 9, 13] for i in (0, 1)},
    **{f"units.0.branch.3.{i}": [1, 5] for i in (0, 1)},
    **{f"units.1.branch.3.{i}": [2, 3] for i in (0, 1)},
}
UPSAMPLED = {"up": [0, 1, 2, 3, 8, 9, 10, 11], "act": [0, 2]}  # four channels make one that is twice as high and wide
INSIDE = {f"units.0.branch.{i}": [0, 3] for i in ("0.0", "0.1", "1", "2")}


@pytest.mark.parametrize(
    ("kind", "removed", "width"),
    [
        (ShuffleNet, STREAM, ("units.1.branch.0.0", "in_channels", 6)),
        (ShuffleNet, INSIDE, ("units.0.branch.3.0", "in_channels", 6)),
        (Twice, {f"{n}.{i}": [1, 2] for n in ("stem", "shared") for i in (0, 1)}, ("tail", "in_channels", 6)),
        (SharedHead, {f"{n}.{i}": [1, 2] for n in ("fine", "coarse") for i in (0, 1)}, ("head.0", "in_channels", 6)),
        (SharedHead, {"head.0": [4], "head.1": [4]}, ("out", "in_channels", 7)),
        (SuperResolution, {"body": [0, 5]}, ("up", "in_channels", 6)),
        (SuperResolution, UPSAMPLED, ("tail", "in_channels", 2)),
        (channel_shuffle, {"0": [1, 5]}, ("3", "in_channels", 6)),
        (pixel_unshuffle, {"0": [1, 5]}, ("3", "in_channels", 24)),
        (ViT, {"blocks.0.up": [0, 5, 6], "blocks.1.up": [3]}, ("blocks.0.down", "in_features", 29)),
        (convnext, {"1.block.3": [0, 5, 6], "2.block.3": [3]}, ("1.block.5", "in_features", 61)),
        (Scaled, {"conv": [0, 3]}, ("tail", "in_channels", 6)),
        (Branching, {"conv": [0, 3]}, ("tail", "in_channels", 6)),
        (dead_consumer, {"0": [0, 3]}, ("2", "in_channels", 6)),
    ],
)
def test_our_engine_removes_what_is_masked(kind, removed, width):
    model = built(kind)
    masks = masks_of(model, removed)
    expected = masked_output(model, masks, X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        speedup(model, X, masks, engine="groups")
    torch.testing.assert_close(model(X), expected, atol=1e-6, rtol=1e-5)
    layer, attribute, left = width
    assert getattr(model.get_submodule(layer), attribute) == left
    model(X).sum().backward()


@pytest.mark.parametrize(
    "name",
    [
        *("plain", "residual", "concat", "dense", "depthwise", "grouped", "split", "flatten", "se"),
        *("shared_input", "transposed", "transformer_mlp", "no_bn", "preact"),
    ],
)
def test_masks_of_units_give_what_our_surgery_gives(name):
    model, x = make_network(name)
    twin = copy.deepcopy(model)
    groups = prunable_groups(twin, x)
    removed = sample_units(groups)
    masks = masks_of_units(groups, removed)
    speedup(model, x, masks, engine="groups")
    remove_units(groups, removed)
    assert model.state_dict().keys() == twin.state_dict().keys()
    assert all(torch.equal(value, twin.state_dict()[key]) for key, value in model.state_dict().items())
    torch.testing.assert_close(model(x), twin(x))
    assert str(model) == str(twin)


def test_masked_inputs_of_a_grouped_convolution():
    """Its mask has the columns of one convolution group."""
    model, x = make_network("grouped")
    columns = torch.ones(1, 4, 1, 1)
    columns[:, 1] = 0.0
    masks = {"1.body.1.0": {"weight": columns}}
    expected = masked_output(model, masks, x)
    speedup(model, x, masks, engine="groups")
    torch.testing.assert_close(model(x), expected, atol=1e-6, rtol=1e-5)
    assert model.get_submodule("1.body.0.0").out_channels == 12


def test_masks_of_a_parametrised_layer():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), parametrizations.weight_norm(nn.Conv2d(8, 8, 3)), nn.Conv2d(8, 4, 1)
    )
    rows = torch.ones(8)
    rows[[1, 2]] = 0.0
    twin = copied(model)
    nn.utils.parametrize.remove_parametrizations(twin[2], "weight")
    masks = {"2": {"weight": rows.view(-1, 1, 1, 1), "bias": rows}}
    expected = masked_output(twin, masks, X)
    magnitudes = model[2].parametrizations.weight.original0.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        speedup(model, X, masks)
    torch.testing.assert_close(model(X), expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(model[2].parametrizations.weight.original0, magnitudes[rows.bool()])
    assert len(model[2].parametrizations.weight) == 1 and model[3].in_channels == 6


def test_an_older_weight_norm_stays_as_it_is():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        model = nn.Sequential(weight_norm(nn.Conv2d(3, 8, 3)), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1))
    masks = masks_of(model, {"1": [0, 3]})
    expected = masked_output(model, masks, X)
    speedup(model, X, masks)
    torch.testing.assert_close(model(X), expected, atol=1e-6, rtol=1e-5)
    assert len(model[0]._forward_pre_hooks) == 1 and model[1].out_channels == 6


def test_a_frozen_model_keeps_hooks_flags_and_modes():
    model = built(ViT).requires_grad_(False).train()
    model.blocks[0].eval()
    calls: list[int] = []
    handle = model.blocks[0].up.register_forward_hook(lambda *_: calls.append(1))
    modes, positions = [m.training for m in model.modules()], model.positions
    state = torch.get_rng_state()
    with torch.inference_mode():
        speedup(model, X, masks_of(model, {"blocks.0.up": [0, 5, 6]}))
    assert [m.training for m in model.modules()] == modes and torch.equal(torch.get_rng_state(), state)
    assert not any(p.requires_grad for p in model.parameters()) and not any(
        p.is_inference() for p in model.parameters()
    )
    assert not calls and model.positions is positions
    model(X)
    handle.remove()
    assert calls == [1] and not model.blocks[0].up._forward_hooks


# -- which engine


@pytest.mark.parametrize(
    ("kind", "removed", "engine"),
    [
        (lambda: make_network("plain")[0], {"0.0": [1, 2], "0.1": [1, 2]}, "nni"),
        (ShuffleNet, INSIDE, "nni"),
        (ShuffleNet, STREAM, "nni"),
        (SuperResolution, UPSAMPLED, "nni"),
        (ViT, {"blocks.0.up": [0, 5, 6]}, "groups"),
        (convnext, {"1.block.3": [0, 5, 6]}, "groups"),
        (Scaled, {"conv": [0, 3]}, "groups"),
        (Branching, {"conv": [0, 3]}, "groups"),
        (dead_consumer, {"0": [0, 3]}, "groups"),
    ],
)
def test_nni_where_it_works_and_else_our_own(kind, removed, engine, caplog):
    model = built(kind)
    masks = masks_of(model, removed)
    expected = masked_output(model, masks, X)
    with warnings.catch_warnings(), caplog.at_level(logging.INFO, "tp_importance"):
        warnings.simplefilter("error")
        speedup(model, X, masks)
    torch.testing.assert_close(model(X), expected, atol=1e-6, rtol=1e-5)
    assert used(caplog) == engine


def test_nni_is_not_blamed_for_what_masks_leave_alone(caplog):
    """Behind a batch norm that is not aligned masked channels are constants: both engines would differ as much."""
    model, x = make_network("concat")
    with caplog.at_level(logging.INFO, "tp_importance"), pytest.warns(UserWarning, match="differ by"):
        speedup(model, x, masks_of(model, {"left.0": [0, 3]}))
    assert used(caplog) == "nni"


def test_a_missing_nni_is_made_up_for(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "nni.compression.speedup", None)  # as if it were not installed
    model, x = make_network("plain")
    with caplog.at_level(logging.INFO, "tp_importance"):
        speedup(model, x, masks_of(model, {"0.0": [1, 2], "0.1": [1, 2]}))
    assert model[0][0].out_channels == 6 and used(caplog) == "groups"


@pytest.mark.parametrize(
    ("name", "removed", "theirs", "ours"),
    [
        ("plain", {"3.2": [0]}, "changed from shapes", r"'3\.2\.weight' takes channels \[0\].* network's output"),
        (
            "plain",
            {"0.1": [0]},
            "left 8 of 8",
            r"'0\.1\.weight' takes channels \[0\], but '0\.0' shares them and keeps",
        ),
        ("plain", {"0.0": [0, 1], "0.1": [0]}, "left 6 of 8", r"'0\.1\.weight' keeps channels \[1\], which the layers"),
        ("residual", {"1.body.1.0": [1], "1.body.1.1": [1]}, "left 8 of 8", "but '0.0' shares them"),
        (
            "residual",
            {"0.0": [0, 1], "1.body.1.0": [1, 2]},
            "left 7 of 8",
            r"channels \[0\], but '1\.body\.1\.0' shares",
        ),
        (
            "grouped",
            {"1.body.1.0": [0, 1]},
            "left 16 of 16",
            r"'1\.body\.1\.0' shares .*\(4 channels of it go at a time\)",
        ),
    ],
)
def test_if_both_fail_the_error_has_both_reasons(name, removed, theirs, ours):
    model, x = make_network(name)
    before = Snapshot(model)
    message = f"(?s)engine='nni': .*{theirs}.*engine='groups': .*{ours}.*The model is unchanged"
    with pytest.raises(RuntimeError, match=message):
        speedup(model, x, masks_of(model, removed))
    before.check()


def test_groups_of_a_convolution_may_lose_other_channels_with_nni_only(caplog):
    model, x = make_network("grouped")
    pruner = L1NormPruner(model, config_list(model, x, 0.5))
    _, masks = pruner.compress()
    pruner.unwrap_model()
    before = Snapshot(model)
    with pytest.raises(RuntimeError, match=r"4 channels of it go at a time.*The model is unchanged"):
        speedup(model, x, masks, engine="groups")
    before.check()
    with caplog.at_level(logging.INFO, "tp_importance"):
        speedup(model, x, masks)
    assert used(caplog) == "nni"


def test_masks_of_a_depthwise_transposed_convolution():
    model = built(
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    )
    mask = torch.ones(8).index_fill(0, torch.tensor([0, 4]), 0)
    masks = {name: {"weight": mask.view(8, 1, 1, 1), "bias": mask} for name in ("0", "1")}
    speedup(model, X, masks, engine="groups")
    assert model[1].groups == model[3].in_channels == 6 and model(X).shape == (2, 4, 8, 8)


class Multiplied(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.register_buffer("factor", factor)

    def forward(self, x):
        return x * self.factor


def test_a_buffer_of_two_layers_stays_one():
    factor = torch.rand(8, 1, 1) + 0.5
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Multiplied(factor), nn.ReLU(), Multiplied(factor), nn.Conv2d(8, 4, 1))
    mask = torch.ones(8).index_fill(0, torch.tensor([0, 4]), 0)
    speedup(model.eval(), X, {"0": {"weight": mask.view(8, 1, 1, 1), "bias": mask}}, engine="groups")
    assert model[1].factor is model[3].factor and model[1].factor.shape == (6, 1, 1)


def test_memory_that_is_used_up_says_nothing_about_an_engine(monkeypatch):
    def fail(*_args, **_options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("nni_plugins.surgery.engines.remove_groups", fail)
    model = built(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)))
    mask = torch.ones(8).index_fill(0, torch.tensor([0, 4]), 0)
    with pytest.raises(torch.OutOfMemoryError):
        speedup(model, X, {"0": {"weight": mask.view(8, 1, 1, 1), "bias": mask}}, engine="groups")


def test_layers_that_share_a_weight():
    model, x = make_network("shared_input")
    model.b[0] = nn.Conv2d(12, 16, 3, padding=1, bias=False)
    model.b[0].weight = model.a[0].weight
    speedup(model, x, masks_of(model, {n: [0, 1] for n in ("a.0", "a.1", "b.0", "b.1")}))
    assert model.b[0].weight is model.a[0].weight and model.a[0].out_channels == model.b[0].out_channels == 14


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "torch"}, "engine='torch' is unknown; choose 'auto', 'nni', 'groups'"),
        ({"engine": "groups", "compat_shim": True}, "engine='groups' does not use"),
    ],
)
def test_wrong_options_are_refused(options, message):
    model, x = make_network("plain")
    before = Snapshot(model)
    with pytest.raises(ValueError, match=message):
        speedup(model, x, masks_of(model, {"0.0": [1, 2], "0.1": [1, 2]}), **options)
    before.check()
