import os
import pickle
import warnings
from functools import partial

import pytest
import torch
import torch_pruning as tp
from torch import nn
from torchvision.models import mobilenet_v3_small, resnet18
from torchvision.models.vision_transformer import VisionTransformer

from tp_importance import Budget
from tp_importance.checkpoints import checkpoint
from tp_importance.checkpoints.checkpoint import load_pruned, save_pruned
from tp_importance.methods.resconv import ResConvPruner, Scale, convert_to_resconv, fuse, remove_layers

resnet = partial(resnet18, num_classes=10)
mobilenet = partial(mobilenet_v3_small, num_classes=10)
vit = partial(VisionTransformer, 32, 8, 2, 4, 32, 64, num_classes=10)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "pruned.pt"


def head_of(model):
    return [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 10]


def prune(model, x, ratio=0.5, **options):
    pruner = tp.pruner.BasePruner(
        model, x, tp.importance.MagnitudeImportance(), pruning_ratio=ratio, ignored_layers=head_of(model), **options
    )
    pruner.step()
    return model


def assert_same(a, b):
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]), name
    assert [str(m) for m in a.modules()] == [str(m) for m in b.modules()]


@pytest.mark.parametrize("factory", [resnet, mobilenet], ids=["resnet18", "mobilenet_v3_small"])
def test_round_trip_after_torch_pruning(factory, path):
    x = torch.randn(2, 3, 64, 64)
    dense = sum(p.numel() for p in factory().parameters())
    model = prune(factory(), x).train()
    model(x)  # running statistics that no factory has
    model.eval()
    assert sum(p.numel() for p in model.parameters()) < 0.5 * dense
    save_pruned(model, path)
    again = load_pruned(factory, path)
    assert_same(model, again)
    assert torch.equal(model(x), again(x))
    assert not any(m.training for m in again.modules())
    again.train()(x).sum().backward()
    assert all(p.grad is not None for p in again.parameters())
    prune(again, x)  # it can be pruned further


def test_attention_heads_and_unwrapped_parameters(path):
    model, x = vit().eval(), torch.randn(2, 3, 32, 32)
    graph = tp.DependencyGraph().build_dependency(
        model, x, unwrapped_parameters=[(model.class_token, 2), (model.encoder.pos_embedding, 2)]
    )
    half = [c for c in range(32) if c % 8 < 4]  # the same number from each of the four heads
    graph.get_pruning_group(model.conv_proj, tp.prune_conv_out_channels, idxs=half).prune()
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.head_dim = module.embed_dim // module.num_heads
    assert model.class_token.shape[-1] == 16
    model.hidden_dim = model.class_token.shape[-1]  # torchvision's forward reshapes to it
    save_pruned(model, path)
    again = load_pruned(vit, path)
    assert again.hidden_dim == 16 and again.encoder.layers[0].self_attention.head_dim == 4
    assert torch.equal(model(x), again(x))


def test_factory_of_another_width(path):
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 5, 3, groups=5), nn.LayerNorm([5, 4, 4]))
    save_pruned(model, path)
    again = load_pruned(
        lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.LayerNorm([8, 1, 1])), path
    )
    assert_same(model, again)
    assert again[2].groups == 5 and again[3].normalized_shape == (5, 4, 4) and again[0].kernel_size == (3, 3)


class Split(nn.Module):
    def __init__(self, sizes=(4, 4), label="dense"):
        super().__init__()
        self.sizes = list(sizes)
        self.counts = tuple(sizes)
        self.label = label
        self.enabled = True
        self.scale = nn.Parameter(torch.randn(sum(sizes)))
        self.weights = nn.ParameterList([torch.randn(s) for s in sizes])
        self.blocks = nn.ModuleList([nn.Linear(s, 2) for s in sizes])
        self.register_buffer("mask", torch.rand(sum(sizes)), persistent=False)

    def forward(self, x):
        parts = torch.split(x * self.scale * self.mask, self.sizes, dim=1)
        return sum(block(part * w) for block, part, w in zip(self.blocks, parts, self.weights, strict=True))


def test_user_attributes_parameters_and_hidden_buffers(path):
    model, x = Split((3, 1), label="pruned"), torch.randn(2, 4)
    model.enabled = False
    save_pruned(model, path)
    again = load_pruned(Split, path)
    assert (again.sizes, again.counts, again.enabled) == ([3, 1], (3, 1), False)
    assert again.label == "dense"  # not a width: the factory's
    assert torch.equal(again.mask, model.mask) and "mask" not in again.state_dict()
    assert torch.equal(model(x), again(x))


def test_file_is_plain(path):
    model = Split((3, 1))
    model.sizes = [torch.tensor(3).numpy()[()], 1]  # a NumPy integer, as pruning code leaves them
    save_pruned(model, path)
    content = torch.load(path, weights_only=True)
    assert content["format"] == "tp_importance.pruned" and content["version"] == 2
    assert content["torch"] == str(torch.__version__)
    assert content["modules"][""]["config"] == {"sizes": [3, 1], "counts": (3, 1), "enabled": True}
    assert [type(n) for n in content["modules"][""]["config"]["sizes"]] == [int, int]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype(path, dtype):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).to(dtype)
    model[1].float()  # mixed, as is usual
    save_pruned(model, path)
    again = load_pruned(lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)), path)
    assert_same(model, again)
    assert again[0].weight.dtype == dtype and again[1].weight.dtype == torch.float32


def test_bits_of_nan_and_zero(path):
    model = nn.Linear(2, 2, bias=False)
    model.weight.data = torch.tensor([[float("nan"), -0.0], [float("inf"), 1e-45]])
    save_pruned(model, path)
    again = load_pruned(lambda: nn.Linear(9, 9, bias=False), path)
    assert torch.equal(again.weight.data.view(torch.int32), model.weight.data.view(torch.int32))


class Tied(nn.Module):
    def __init__(self, tie=True):
        super().__init__()
        self.embed, self.head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
        if tie:
            self.head.weight = self.embed.weight


@pytest.mark.parametrize("factory_ties", [True, False])
@pytest.mark.parametrize("saved_ties", [True, False])
def test_ties_come_from_the_file(path, saved_ties, factory_ties):
    model = Tied(saved_ties)
    model.embed.weight = nn.Parameter(model.embed.weight[:, :3].detach())
    model.head.weight = model.embed.weight if saved_ties else nn.Parameter(model.head.weight[:, :3].detach())
    save_pruned(model, path)
    again = load_pruned(lambda: Tied(factory_ties), path)
    assert (again.embed.weight is again.head.weight) is saved_ties
    assert torch.equal(again.head.weight, model.head.weight)
    assert torch.equal(again.embed.weight, model.embed.weight)


def test_requires_grad(path):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].requires_grad_(False)
    save_pruned(model, path)
    again = load_pruned(lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(5, 3)), path)
    assert [p.requires_grad for p in again.parameters()] == [False, False, True, True]


def test_recurrent_layer(path):
    model, x = nn.Sequential(nn.LSTM(3, 4)), torch.randn(2, 1, 3)
    save_pruned(model, path)
    again = load_pruned(lambda: nn.Sequential(nn.LSTM(3, 8)), path)
    assert torch.equal(model(x)[0], again(x)[0])


def test_meta_factory(path):
    model, x = resnet(), torch.randn(1, 3, 64, 64)
    save_pruned(model.eval(), path)

    def factory():
        with torch.device("meta"):
            return resnet()

    assert torch.equal(load_pruned(factory, path)(x), model(x))


# Surgery: what later methods do to a network.


def conv_bn():
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))


def test_fused_and_replaced_layers(path):
    model, x = conv_bn().eval(), torch.randn(1, 3, 8, 8)
    model[0] = torch.nn.utils.fuse_conv_bn_eval(model[0], model[1])
    model[1] = nn.Identity()
    model[2] = nn.Conv2d(4, 4, 3, padding="same", padding_mode="reflect", bias=False)
    model[3] = nn.Identity()
    save_pruned(model, path)
    again = load_pruned(conv_bn, path)
    assert_same(model, again)
    assert torch.equal(model(x), again(x))
    assert not list(again[1].buffers()) and again[0].bias is not None


def test_rebuilt_batch_normalisation_keeps_its_constants(path):
    model = nn.Sequential(
        nn.BatchNorm1d(3, eps=0.5, momentum=None, affine=False), nn.BatchNorm1d(2, eps=0.25, momentum=None)
    )
    save_pruned(model, path)
    again = load_pruned(lambda: nn.Sequential(nn.Identity(), nn.BatchNorm1d(3)), path)
    assert (again[0].eps, again[0].momentum, again[0].weight) == (0.5, None, None)
    assert (again[1].eps, again[1].momentum) == (0.25, None)


def test_container_becomes_identity_and_bias_goes(path):
    def factory():
        return nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), nn.Linear(3, 3))

    model = factory()
    model[0], model[1].bias = nn.Identity(), None
    save_pruned(model, path)
    assert_same(model, load_pruned(factory, path))


@pytest.mark.parametrize("shared", ["file", "factory", "both"])
def test_shared_layers(path, shared):
    def network(share):
        first = nn.Linear(3, 3)
        return nn.Sequential(first, nn.ReLU(), first if share else nn.Linear(3, 3))

    model, x = network(shared != "factory"), torch.randn(2, 3)
    save_pruned(model, path)
    again = load_pruned(lambda: network(shared != "file"), path)
    assert (again[0] is again[2]) is (model[0] is model[2])
    assert torch.equal(model(x), again(x))


# Errors.


def user_block():
    return nn.Sequential(*conv_bn()[:3], Split())


@pytest.mark.parametrize(
    ("saved", "factory", "message"),
    [
        (conv_bn, lambda: conv_bn()[:3], "layer '3'.*in the file but not in the factory's model.*factory that built"),
        (conv_bn, lambda: conv_bn().append(nn.ReLU()), "layer '4'.*of the factory's model is not in the file"),
        (
            conv_bn,
            lambda: nn.ModuleList(conv_bn()),
            "file holds a .*Sequential, the factory builds a .*ModuleList; load with",
        ),
        (user_block, conv_bn, r"layer '3' is a .*Split.*Conv2d"),
    ],
)
def test_wrong_factory(path, saved, factory, message):
    save_pruned(saved(), path)
    with pytest.raises(ValueError, match=message):
        load_pruned(factory, path)


@pytest.mark.parametrize("shared", [True, False])
def test_shared_user_module_on_one_side_only(path, shared):
    def network(share):
        first = Split()
        return nn.ModuleList([first, first if share else Split()])

    save_pruned(network(shared), path)
    with pytest.raises(ValueError, match=r"layer '1' is a .*module '[01]'.*module '[01]'"):
        load_pruned(lambda: network(not shared), path)


def test_other_network(path):
    save_pruned(resnet(), path)
    with pytest.raises(ValueError, match=r"the file holds a .*ResNet, the factory builds a .*MobileNetV3"):
        load_pruned(mobilenet, path)


class Extra(nn.Module):
    def __init__(self, extra=False):
        super().__init__()
        if extra:
            self.gain = nn.Parameter(torch.ones(1))


@pytest.mark.parametrize("saved", [True, False])
def test_user_parameter_on_one_side_only(path, saved):
    save_pruned(nn.Sequential(Extra(saved)), path)
    with pytest.raises(ValueError, match=r"'0\.gain'"):
        load_pruned(lambda: nn.Sequential(Extra(not saved)), path)


@pytest.mark.parametrize("factory", [None, 3, nn.Linear(2, 2), lambda: None])
def test_factory_of_wrong_type(path, factory):
    save_pruned(nn.Linear(2, 2), path)
    with pytest.raises(TypeError, match="factory"):
        load_pruned(factory, path)


class Sized(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc = nn.Linear(width, 2)


def failing(error):
    def build(width=3):
        raise error

    return build


def given(x, *more):
    return Sized(x)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (
            Sized,
            r"factory Sized could.*missing 1 .*'width'\): give a function without arguments, .*lambda: Sized\(\.\.\.\)",
        ),
        (partial(given), r"factory given could.*lambda: given\(\.\.\.\)"),
        (lambda width: Sized(width), r"factory <lambda> could.*lambda: Net\(\.\.\.\)"),
        (failing(TypeError("inside")), r"factory build could not build the network \(inside\): it must build"),
        (partial(Sized, "3"), r"factory Sized could.*it must build the network when it is called without arguments"),
    ],
)
def test_factory_that_cannot_be_called(path, factory, message):
    save_pruned(Sized(3), path)
    with pytest.raises(TypeError, match=message) as caught:
        load_pruned(factory, path)
    assert isinstance(caught.value.__cause__, TypeError)


@pytest.mark.parametrize("error", [KeyError("depth"), RuntimeError("no memory"), OSError("no weights")])
def test_factory_that_raises(path, error):
    save_pruned(Sized(3), path)
    with pytest.raises(
        ValueError, match=f"factory build could not build the network .{type(error).__name__}"
    ) as caught:
        load_pruned(failing(error), path)
    assert caught.value.__cause__ is error


def test_unreadable_files(path, tmp_path):
    for content in (b"", b"garbage", pickle.dumps({"format": 1}, protocol=2), b"PK\x03\x04 not a zip"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="save_pruned"):
            load_pruned(resnet, path)
    for wrong in (nn.Linear(2, 2).state_dict(), nn.Linear(2, 2), [1]):
        torch.save(wrong, path)
        with pytest.raises(ValueError, match="save_pruned"):
            load_pruned(resnet, path)
    for missing in (tmp_path, tmp_path / "none.pt"):
        with pytest.raises(ValueError, match="is not a file"):
            load_pruned(resnet, missing)
    torch.save({"format": "tp_importance.pruned", "version": 99}, path)
    with pytest.raises(ValueError, match="version 99"):
        load_pruned(resnet, path)


def test_truncated_file(path):
    save_pruned(nn.Linear(50, 50), path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ValueError, match="damaged"):
        load_pruned(lambda: nn.Linear(50, 50), path)


def test_refused_arguments(path, tmp_path):
    with pytest.raises(TypeError, match=r"nn\.Module"):
        save_pruned({"weight": 1}, path)
    for wrong in (3, b"x.pt", open):
        with pytest.raises(TypeError, match="path"):
            save_pruned(nn.ReLU(), wrong)
        with pytest.raises(TypeError, match="path"):
            load_pruned(nn.ReLU, wrong)
    for wrong in (tmp_path, tmp_path / "none" / "x.pt"):
        with pytest.raises(ValueError, match="folder"):
            save_pruned(nn.ReLU(), wrong)


class Stateful(nn.Module):
    def get_extra_state(self):
        return {"any": object()}


def test_extra_state_is_refused_when_saving(path):
    with pytest.raises(ValueError, match=r"layer '0'.*extra state"):
        save_pruned(nn.Sequential(Stateful()), path)
    assert not path.exists()


# Writing.


def test_failed_write_keeps_the_old_file(path, monkeypatch):
    save_pruned(nn.Linear(2, 2), path)
    before = path.read_bytes()

    def broken(content, file):
        file.write(b"half a file")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match="disk full"):
        save_pruned(nn.Linear(3, 3), path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_failed_replace_leaves_nothing(path, monkeypatch):
    def broken(*_):
        raise PermissionError("no")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(PermissionError):
        save_pruned(nn.Linear(3, 3), path)
    assert os.listdir(path.parent) == []


def test_overwrite_links_and_strings(path, tmp_path, monkeypatch):
    link = tmp_path / "link.pt"
    save_pruned(nn.Linear(2, 2), path)
    link.symlink_to(path)
    save_pruned(nn.Linear(3, 3), str(link))
    assert link.is_symlink() and load_pruned(lambda: nn.Linear(1, 1), path).in_features == 3
    monkeypatch.chdir(tmp_path)
    save_pruned(nn.Linear(4, 4), "bare")
    assert sorted(os.listdir()) == ["bare", "link.pt", "pruned.pt"]
    umask = os.umask(0)
    os.umask(umask)
    assert os.stat("bare").st_mode & 0o777 == 0o666 & ~umask


def test_saving_changes_nothing(path):
    model = resnet().train()
    state = {n: t.clone() for n, t in model.state_dict().items()}
    save_pruned(model, path)
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items()) and model.training


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()

    def forward(self, x):
        return self.act(x + self.bn(self.conv(x)))


def residuals():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU6(), Residual(), Residual(), nn.ReLU6(), nn.Conv2d(8, 2, 1))


@pytest.mark.parametrize("gone", [[], ["2.conv"], ["2.conv", "3.conv"]], ids=len)
@pytest.mark.parametrize("fused", [True, False])
def test_removed_and_fused_layers(path, gone, fused):
    """Blocks that are gone, factors that stay, convolutions that have gained a bias."""
    x = torch.randn(2, 3, 8, 8)
    model = convert_to_resconv(residuals().eval(), x, a=0.5)
    if gone:
        remove_layers(model, x, gone)
    names = [name for name in ("2.conv", "3.conv") if name not in gone]
    if fused and len(gone) < 2:
        fuse(model)
    scales = {n: m.factor.item() for n, m in model.named_modules() if isinstance(m, Scale)}
    assert bool(scales) == bool(gone)
    plain = fused or len(gone) == 2
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        save_pruned(model, path)
    assert len(said) == (not plain)
    again = load_pruned(residuals if plain else lambda: convert_to_resconv(residuals(), x), path)
    assert_same(model, again)
    assert torch.equal(model(x), again(x))
    assert {n: m.factor.item() for n, m in again.named_modules() if isinstance(m, Scale)} == scales
    if not plain:
        message = str(said[0].message)
        assert said[0].category is UserWarning and said[0].filename == __file__
        assert f"layers of class ResConv2d ({', '.join(names)})" in message
        with pytest.raises(ValueError, match=r"layer '[23]\.conv' is a .*ResConv2d") as caught:
            load_pruned(residuals, path)
        for text in (message, str(caught.value)):
            assert "fuse(model) first" in text and "factory that calls convert_to_resconv on the network" in text
    again.train()(x).sum().backward()


def test_unfused_layers_are_saved_where_warnings_are_errors(path):
    model = convert_to_resconv(residuals().eval(), torch.randn(2, 3, 8, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="ResConv2d"):
            save_pruned(model, path)
    assert path.exists()


def test_step_without_fusing_can_be_loaded(path):
    x = torch.randn(2, 3, 8, 8)
    model = convert_to_resconv(residuals().eval(), x, a=0.5)
    ResConvPruner(model, x, budget=Budget(macs=0.9)).step(fuse=False)
    with pytest.warns(UserWarning, match="ResConv2d"):
        save_pruned(model, path)
    assert torch.equal(load_pruned(lambda: convert_to_resconv(residuals(), x), path)(x), model(x))
    with pytest.raises(ValueError, match="convert_to_resconv"):
        load_pruned(residuals, path)
    fuse(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_pruned(model, path)
    assert torch.equal(load_pruned(residuals, path)(x), model(x))


def test_register_rebuilt(path, monkeypatch):
    class Gain(nn.Module):
        """A layer of the user's, with a float in its constructor."""

        def __init__(self, size: int = 1, gain: float = 1.0, mode: str = "mul"):
            super().__init__()
            self.size, self.gain, self.mode = size, gain, mode
            self.weight = nn.Parameter(torch.ones(size))

        def forward(self, x):
            return x * self.weight * self.gain if self.mode == "mul" else x

    monkeypatch.setattr("tp_importance.checkpoints.checkpoint.REBUILT", dict(checkpoint.REBUILT))
    model = nn.Sequential(nn.Linear(4, 4), Gain(4, 0.5))
    save_pruned(model, path)
    with pytest.raises(ValueError, match=r"layer '1' is a .*Gain"):
        load_pruned(lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU()), path)
    checkpoint.register_rebuilt(Gain)
    checkpoint.register_rebuilt(Gain)
    save_pruned(model, path)
    again = load_pruned(lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU()), path)
    x = torch.randn(3, 4)
    assert again[1].gain == 0.5 and torch.equal(again(x), model(x))
    other = type("Gain", (nn.Module,), {"__module__": Gain.__module__, "__qualname__": Gain.__qualname__})
    with pytest.raises(ValueError, match="registered already"):
        checkpoint.register_rebuilt(other)
