"""Through a file and back: values, types, ties, attributes."""

from functools import partial

import pytest
import torch
import torch_pruning as tp
from torch import nn
from torchvision.models.vision_transformer import VisionTransformer

from helpers.checkpoint_cases import Split, assert_same, mobilenet, resnet
from tp_importance.checkpoints.checkpoint import load_pruned, save_pruned

vit = partial(VisionTransformer, 32, 8, 2, 4, 32, 64, num_classes=10)


def head_of(model):
    return [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 10]


def prune(model, x, ratio=0.5, **options):
    pruner = tp.pruner.BasePruner(
        model, x, tp.importance.MagnitudeImportance(), pruning_ratio=ratio, ignored_layers=head_of(model), **options
    )
    pruner.step()
    return model


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


def test_user_attributes_parameters_and_hidden_buffers(path):
    model, x = Split((3, 1), label="pruned"), torch.randn(2, 4)
    model.enabled = False
    save_pruned(model, path)
    again = load_pruned(Split, path)
    assert (again.sizes, again.counts, again.enabled) == ([3, 1], (3, 1), False)
    assert again.label == "pruned"
    assert torch.equal(again.mask, model.mask) and "mask" not in again.state_dict()
    assert torch.equal(model(x), again(x))


def test_file_is_plain(path):
    model = Split((3, 1))
    model.sizes = [torch.tensor(3).numpy()[()], 1]  # a NumPy integer, as pruning code leaves them
    save_pruned(model, path)
    content = torch.load(path, weights_only=True)
    assert content["format"] == "tp_importance.pruned" and content["version"] == 3
    assert content["torch"] == str(torch.__version__)
    config = {"sizes": [3, 1], "counts": (3, 1), "label": "dense", "enabled": True}
    assert content["modules"][""]["config"] == config and content["modules"][""]["other"] == {}
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
