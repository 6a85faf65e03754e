import logging
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

nni = pytest.importorskip("nni")

from nni.compression.pruning import L1NormPruner  # noqa: E402

from helpers.networks import make_zoo_network  # noqa: E402
from helpers.nni_speedup_cases import Masks, config_list, masked_output, masks_of  # noqa: E402
from nni_plugins.surgery.speedup import speedup  # noqa: E402
from tp_importance.testing import Snapshot, make_network  # noqa: E402
from tp_importance.testing.networks import randomise_batchnorm  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore:.torch.jit:FutureWarning"
)  # NNI's search for dependencies traces with it

ENGINES = pytest.mark.parametrize("engine", ["nni", "groups"])


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        *(
            (name, engine)
            for name in ("plain", "residual", "depthwise", "se", "concat")
            for engine in ("nni", "groups")
        ),
        ("grouped", "nni"),
        pytest.param("mobilenet_v3_small", "nni", marks=pytest.mark.slow),
        pytest.param("mobilenet_v3_small", "groups", marks=pytest.mark.slow),
    ],
)
def test_masks_of_an_nni_pruner_are_removed_exactly(name, engine):
    model, x = make_zoo_network(name) if name == "mobilenet_v3_small" else make_network(name)
    widths = {n: m.out_channels for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    pruner = L1NormPruner(model, config_list(model, x, 0.5))
    _, masks = pruner.compress()
    with torch.no_grad():
        masked = model(x)
    pruner.unwrap_model()
    modules = list(model.modules())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # would tell of a difference
        assert speedup(model, x, masks, engine=engine) is model
    torch.testing.assert_close(model(x), masked, atol=1e-6, rtol=1e-5)
    assert [id(m) for m in model.modules()] == [id(m) for m in modules]
    for conv, width in widths.items():
        module, kept = model.get_submodule(conv), int(masks[conv]["weight"].flatten(1).any(1).sum())
        assert kept <= 0.6 * width
        assert module.out_channels == kept == module.weight.shape[0]
    model(x).sum().backward()


@ENGINES
def test_linear_layers_behind_flatten_follow(engine):
    model, x = make_network("flatten")
    masks = masks_of(model, {"1.0": [0, 3], "1.1": [0, 3], "3": [5]})
    expected = masked_output(model, masks, x)
    speedup(model, x, masks, engine=engine)
    torch.testing.assert_close(model(x), expected, atol=1e-6, rtol=1e-5)
    assert model[3].weight.shape == (23, 10 * 16) and model[3].in_features == 160
    assert model[5].weight.shape == (4, 23)


@ENGINES
def test_input_channels_and_broadcast_masks(engine):
    model, x = make_network("plain")
    columns = torch.ones(1, 8, 1, 1)
    columns[:, [2, 5]] = 0.0
    expected = masked_output(model, {"1.0": {"weight": columns}}, x)
    speedup(model, x, {"1.0": {"weight": columns, "bias": None}}, engine=engine)
    torch.testing.assert_close(model(x), expected, atol=1e-6, rtol=1e-5)
    assert model[0][0].out_channels == model[0][1].num_features == model[1][0].in_channels == 6


@ENGINES
def test_a_batch_norm_that_is_not_aligned_is_reported(engine):
    model, x = make_network("concat")
    with pytest.warns(UserWarning, match="differ by .* align the masks of batch norms"):
        speedup(model, x, masks_of(model, {"left.0": [0, 3]}), engine=engine)
    assert model.left[0].out_channels == model.left[1].num_features == 10


class Shuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.tail = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = self.conv(x).shape
        y = F.relu(self.bn(self.conv(x))).view(n, 2, c // 2, h, w).transpose(1, 2)
        return self.tail(y.reshape(n, c, h, w))


def test_an_operation_that_moves_channels_is_reported():
    model, x = Shuffle(), torch.randn(2, 3, 8, 8)
    randomise_batchnorm(model, x)
    masks = masks_of(model, {"conv": [0, 1, 2, 5], "bn": [0, 1, 2, 5]})
    before = Snapshot(model)
    with pytest.raises(RuntimeError, match=r"differ by .* takes its result as it is.*engine='groups': .*unchanged"):
        speedup(model, x, masks)
    before.check()
    with pytest.warns(UserWarning, match="channel shuffle"):
        speedup(model, x, masks, engine="nni")


PLAIN = {"0.0": [1, 2], "0.1": [1, 2]}


def _with(**targets: Tensor) -> Masks:
    return {"0.1": targets}


UNSTRUCTURED = torch.ones(8, 3, 3, 3)
UNSTRUCTURED[0, 0, 0, 0] = 0.0
HALF = torch.tensor([1.0, 0.0] * 4)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({}, "remove nothing"),
        (_with(weight=torch.ones(8), bias=torch.ones(8)), "remove nothing; call pruner.compress"),
        ({"0.1": {"weight": None}}, "remove nothing"),
        ({"features.7": {"weight": HALF}}, "'features.7' that the model does not have"),
        (_with(gamma=HALF), "no parameter '0.1.gamma'"),
        (_with(_output_0=HALF), "no parameter '0.1._output_0'"),
        (_with(weight=torch.zeros(7)), r"'0.1.weight' has shape \(7,\), the parameter \(8,\); pass"),
        ({"0.0": {"weight": HALF}}, r"'0.0.weight' has shape \(8,\), the parameter \(8, 3, 3, 3\)"),
        (_with(weight=torch.full((8,), 0.5)), "'0.1.weight' has values other than 0 and 1"),
        (_with(weight=torch.full((8,), torch.nan)), "'0.1.weight' has values other than 0 and 1"),
        ({"0.0": {"weight": UNSTRUCTURED}}, "'0.0.weight' .* unstructured"),
        ({"0.0": {"weight": torch.zeros(8, 1, 1, 1)}}, "'0.0.weight' removes all 8 channels"),
        (_with(weight=HALF, bias=torch.ones(8)), "'0.1' contradict each other: weight keeps 4, bias 8 of 8"),
    ],
)
def test_wrong_masks_are_refused(masks, message):
    model, x = make_network("plain")
    before = Snapshot(model)
    with pytest.raises(ValueError, match=message):
        speedup(model, x, masks)
    before.check()


def shared_parameter() -> tuple[nn.Module, Tensor, Masks]:
    model, x = make_network("shared_input")
    model.b[0] = nn.Conv2d(12, 16, 3, padding=1, bias=False)
    model.b[0].weight = model.a[0].weight
    return model, x, masks_of(model, {n: [0, 1] for n in ("a.0", "a.1", "b.0", "b.1")})


def pixel_shuffle() -> tuple[nn.Module, Tensor, Masks]:
    layers = [nn.Conv2d(3, 16, 3), nn.PixelShuffle(2), nn.Conv2d(4, 4, 1), nn.AdaptiveAvgPool2d(1)]
    model = nn.Sequential(*layers)
    return model, torch.randn(2, 3, 8, 8), masks_of(model, {"0": [i for i in range(16) if i % 4]})


def zero_convolution() -> tuple[nn.Module, Tensor, Masks]:
    model, x = make_network("plain")
    nn.init.zeros_(model[1][0].weight)  # NNI takes it for dead, and everything before it
    return model, x, masks_of(model, PLAIN)


def of(name: str, removed: dict[str, list[int]]) -> tuple[nn.Module, Tensor, Masks]:
    model, x = make_network(name)
    return model, x, masks_of(model, removed)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (lambda: of("plain", {"3.2": [0]}), r"changed from shapes \[\(2, 4\)\] to \[\(2, 3\)\].*last layer"),
        (lambda: of("plain", {"0.1": [0]}), "left 8 of 8 .* '0.1.weight', the masks keep 7.* not the layer before"),
        (lambda: of("residual", {"1.body.1.0": [1], "1.body.1.1": [1]}), "'1.body.1.0.weight', .* share channels"),
        (
            lambda: of("residual", {"0.0": [0, 1], "1.body.1.0": [1, 2]}),
            "left 7 of 8 .* '0.0.weight', the masks keep 6",
        ),
        (lambda: of("depthwise", {"1.body.0": [0, 5]}), "left 24 of 24 .* '1.body.0.weight'"),
        (lambda: of("grouped", {"1.body.1.0": [0, 1], "1.body.1.1": [0, 1]}), "left 16 of 16 .* '1.body.1.0.weight'"),
        (shared_parameter, r"'a.0' .* shared parameters \['weight'\]"),
        (pixel_shuffle, r"'1' from PixelShuffle\(upscale_factor=2\) into .* changes more than its width"),
        (zero_convolution, "ModelSpeedup failed at call_module '0.0': EmptyLayerError"),
    ],
)
def test_what_nni_cannot_remove_is_an_error_and_changes_nothing(case, message):
    model, x, masks = case()
    before = Snapshot(model)
    with pytest.raises(RuntimeError, match=f'{message}.*engine="auto".*The model is unchanged'):
        speedup(model, x, masks, engine="nni")
    before.check()


def test_layers_out_of_use_and_raw_parameters():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.unused, self.tail = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
            self.scale = nn.Parameter(torch.rand(8, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.tail(self.conv(x) * self.scale)

    model, x = Odd(), torch.randn(2, 3, 8, 8)
    before = Snapshot(model)
    with pytest.raises(RuntimeError, match=r"does not call \['unused'\]"):
        speedup(model, x, masks_of(model, {"unused": [0]}))
    with pytest.raises(RuntimeError, match=r"does not run on the example inputs.*size of tensor"):
        speedup(model, x, masks_of(model, {"conv": [0]}), engine="nni")
    before.check()


def test_a_wrapped_model_is_refused():
    model, x = make_network("plain")
    _, masks = L1NormPruner(model, [{"op_names": ["1.0"], "sparse_ratio": 0.5}]).compress()
    with pytest.raises(RuntimeError, match=r"wrapped by NNI, at '1.0._nni_wrapper'; call pruner.unwrap_model\(\)"):
        speedup(model, x, masks)


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ("image", TypeError, "example_inputs are of type str"),
        ((), TypeError, "do not fit Sequential.forward.*missing a required argument"),
        ({"x": torch.randn(1, 3, 8, 8)}, TypeError, "do not fit Sequential.forward"),
        (torch.randn(1, 4, 8, 8), RuntimeError, "does not run on the example inputs.*expected input"),
    ],
)
def test_wrong_example_inputs_are_refused(inputs, error, message):
    model, _ = make_network("plain")
    before = Snapshot(model)
    with pytest.raises(error, match=message):
        speedup(model, inputs, masks_of(model, PLAIN))
    before.check()


@pytest.mark.parametrize("masks", [[PLAIN], {"0.1": HALF}, {"0.1": {"weight": HALF.tolist()}}])
def test_masks_of_a_wrong_type_are_refused(masks):
    model, x = make_network("plain")
    with pytest.raises(TypeError, match=r"of type (list|Tensor); pass the dict returned by compress\(\)"):
        speedup(model, x, masks)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None = None, *, twice: bool = False) -> dict[str, Tensor]:
        z = F.relu_(self.a(x)) + F.relu_(self.b(y))
        z = z if mask is None else z * mask
        return {"out": self.c(2 * z if twice else z)}


X, Y = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)


@ENGINES
@pytest.mark.parametrize(
    "inputs",
    [(X, Y), [X, Y], {"y": Y, "x": X}, {"y": Y, "x": X, "twice": True}, (X, Y, torch.ones(2, 1, 6, 6))],
    ids=["tuple", "list", "dict", "flag", "optional"],
)
def test_forms_of_example_inputs(inputs, engine):
    model = TwoInputs()
    call = inputs if isinstance(inputs, dict) else dict(zip(("x", "y", "mask"), inputs, strict=False))
    masks = masks_of(model, {"a": [0, 3], "b": [0, 3]})
    weights = {n: p * masks.get(n[0], {}).get(n[2:], 1.0) for n, p in model.named_parameters()}
    expected = torch.func.functional_call(model, weights, kwargs=call)["out"]
    speedup(model, inputs, masks, engine=engine)
    torch.testing.assert_close(model(**call)["out"], expected, atol=1e-6, rtol=1e-5)
    assert model.c.in_channels == 6


@ENGINES
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_everything_else_stays_as_it_was(context, engine, capfd):
    model, x = make_network("plain")
    model.train()
    model[1].eval()
    model[0][1].num_batches_tracked.fill_(7)
    frozen = {"0.0.weight", "1.0.weight", "2.1.bias"}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    calls: list[nn.Module] = []
    model[0][0].register_forward_hook(lambda module, *_: calls.append(module))
    training = [m.training for m in model.modules()]
    untouched = model[2][0].weight
    masks = masks_of(model, PLAIN)
    copies = {k: {t: m.clone() for t, m in v.items()} for k, v in masks.items()}
    inputs, rng, dtype = x.clone(), torch.get_rng_state(), torch.get_default_dtype()
    level = logging.getLogger("nni.compression.speedup").level

    with context():
        speedup(model, x, masks, engine=engine)

    assert {n for n, p in model.named_parameters() if not p.requires_grad} == frozen
    assert [m.training for m in model.modules()] == training
    assert model[2][0].weight is untouched and int(model[0][1].num_batches_tracked) == 7
    assert not calls and len(model[0][0]._forward_hooks) == 1
    assert torch.equal(inputs, x) and torch.equal(rng, torch.get_rng_state()) and torch.get_default_dtype() == dtype
    assert all(torch.equal(copies[k][t], masks[k][t]) for k in masks for t in masks[k])
    assert logging.getLogger("nni.compression.speedup").level == level
    assert capfd.readouterr().out == ""
    model(x).sum().backward()
    assert model[0][1].weight.grad is not None and model[0][0].weight.grad is None


@ENGINES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_precision(dtype, engine):
    model, x = make_network("residual")
    model, x = model.to(dtype), x.to(dtype)
    masks = masks_of(model, {n: [0, 3] for n in ("0.0", "0.1", "1.body.1.0", "1.body.1.1")})
    kept = model[0][0].weight[[1, 2, 4, 5, 6, 7]].clone()
    speedup(model, x, masks, engine=engine)
    assert {t.dtype for t in model.state_dict().values() if t.is_floating_point()} == {dtype}
    assert torch.equal(model[0][0].weight, kept)


@ENGINES
def test_flattening_by_size(engine):
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8 * 36, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return self.fc(F.relu_(x).view(x.size(0), -1))

    model = Flat()
    masks = masks_of(model, {"conv": [0, 3]})
    expected = masked_output(model, masks, X)
    speedup(model, X, masks, engine=engine)
    torch.testing.assert_close(model(X), expected)
    assert model.fc.in_features == 6 * 36


@ENGINES
def test_example_inputs_may_be_written_into(engine):
    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x.add_(1.0)))

    model, x = Overwrites(), X.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # masked and sped-up model must see the same input
        speedup(model, x, masks_of(model, {"a": [0, 3]}), engine=engine)
    assert torch.equal(x, X)


@ENGINES
def test_a_head_with_one_output(engine):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1))
    masks = masks_of(model, {"0": [0, 3]})
    expected = masked_output(model, masks, X)
    speedup(model, X, masks, engine=engine)
    torch.testing.assert_close(model(X), expected)
    assert model[4].weight.shape == (1, 6)
