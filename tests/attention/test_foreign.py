"""Modules of packages that need not be installed: by classes of the same names, and by the real ones if present."""

import pytest
import torch
from torch import nn

from helpers.checkpoint_cases import assert_same
from tp_importance import explicit_attention, load_pruned, save_pruned
from tp_importance.core.copies import copied


def named(name):
    """A class that says it is from there."""

    def rename(cls):
        cls.__module__, _, cls.__qualname__ = name.rpartition(".")
        return cls

    return rename


@named("transformers.pytorch_utils.Conv1D")
class Conv1D(nn.Module):
    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


def turned():
    return nn.Sequential(Conv1D(6, 4), nn.Tanh(), Conv1D(3, 6)).double()


def test_turned_linear_layers(tmp_path):
    model = turned()
    model[0].weight.requires_grad_(False)
    twin, x = copied(model), torch.randn(2, 5, 4, dtype=torch.double)
    assert list(explicit_attention(model, x).rewritten) == ["0", "2"]
    assert [str(m) for m in (model[0], model[2])] == [
        "Linear(in_features=4, out_features=6, bias=True)",
        "Linear(in_features=6, out_features=3, bias=True)",
    ]
    assert torch.equal(model[0].weight, twin[0].weight.T) and model[0].weight.is_contiguous()
    assert not model[0].weight.requires_grad and model[0].bias.requires_grad
    for net in (model, twin):
        net(x).square().sum().backward()
    torch.testing.assert_close(model(x), twin(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model[2].weight.grad, twin[2].weight.grad.T)
    save_pruned(model.eval(), tmp_path / "model.pt")
    assert_same(model, load_pruned(turned, tmp_path / "model.pt"))


def test_turned_weights_that_are_shared():
    model = nn.Sequential(Conv1D(4, 4), Conv1D(4, 4), Conv1D(4, 4), Conv1D(4, 4))
    model[1].weight, model[1].bias = model[0].weight, model[0].bias
    model[3].weight = model[2].weight
    report = explicit_attention(model, torch.randn(2, 4))
    assert list(report.rewritten) == ["0", "1"] and model[0].weight is model[1].weight
    assert report.left_out == {"2": "its weight is shared with 3", "3": "its weight is shared with 2"}


def convolution(inputs, outputs, kernel=1, groups=1):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups), nn.BatchNorm2d(outputs)
    )


@named("ultralytics.nn.modules.block.Attention")
class Attention(nn.Module):
    """One head after the other, by hand."""

    def __init__(self, dim, num_heads, attn_ratio=0.5):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.key_dim = int(self.head_dim * attn_ratio)
        self.scale = self.key_dim**-0.5
        self.qkv = convolution(dim, dim + 2 * self.key_dim * num_heads)
        self.proj, self.pe = convolution(dim, dim), convolution(dim, dim, 3, dim)

    def forward(self, x):
        heads, values = [], []
        for head in self.qkv(x).chunk(self.num_heads, 1):
            q, k, v = head.flatten(2).split([self.key_dim, self.key_dim, self.head_dim], 1)
            weights = (q.transpose(1, 2) @ k * self.scale).softmax(-1)
            heads.append(v @ weights.transpose(1, 2))
            values.append(v)
        return self.proj(torch.cat(heads, 1).view(x.shape) + self.pe(torch.cat(values, 1).view(x.shape)))


@named("ultralytics.nn.modules.block.AAttn")
class AreaAttention(nn.Module):
    """One area and one head after the other, by hand."""

    def __init__(self, dim, num_heads, area=1):
        super().__init__()
        self.area, self.num_heads, self.head_dim = area, num_heads, dim // num_heads
        self.all_head_dim = dim
        self.qkv = convolution(dim, 3 * dim)
        self.proj, self.pe = convolution(dim, dim), convolution(dim, dim, 7, dim)

    def forward(self, x):
        heads, values = [], []
        for head in self.qkv(x).flatten(2).chunk(self.num_heads, 1):
            areas = []
            for part in head.chunk(self.area, 2):
                q, k, v = part.chunk(3, 1)
                weights = (q.transpose(1, 2) @ k * self.head_dim**-0.5).softmax(-1)
                areas.append(v @ weights.transpose(1, 2))
            heads.append(torch.cat(areas, 2))
            values.append(head.chunk(3, 1)[2])
        return self.proj(torch.cat(heads, 1).view(x.shape) + self.pe(torch.cat(values, 1).view(x.shape)))


SPATIAL = {
    "plain": lambda: Attention(16, 2),
    "one area": lambda: AreaAttention(16, 2),
    "four": lambda: AreaAttention(16, 4, 4),
}


def same_on_maps(old, x):
    """Rewrites a copy and compares: outputs in both modes, gradients, names of parameters."""
    new = copied(old)
    assert list(explicit_attention(new, x).rewritten) == ["0"] and type(new[0]).__name__ == "ExplicitSpatialAttention"
    assert list(new.state_dict()) == list(old.state_dict())
    for training in (True, False):
        found = []
        for net in (old, new):
            net.zero_grad()
            out = net.train(training)(x)
            out.pow(3).sum().backward()
            found.append([out, *(p.grad for p in net.parameters())])
        torch.testing.assert_close(*found, rtol=1e-8, atol=1e-9)
    return new


@pytest.mark.parametrize("kind", SPATIAL)
def test_attention_between_pixels(kind):
    torch.manual_seed(0)
    old = nn.Sequential(SPATIAL[kind]()).double()
    for p in old.parameters():
        nn.init.normal_(p)
    x = torch.randn(2, 16, 4, 6, dtype=torch.double)
    new = same_on_maps(old, x)
    old.eval()
    heads, size = old[0].num_heads, new[0].head_dim * 2 + new[0].value_dim
    with torch.no_grad():  # the last head goes as if its output were zero, behind the depthwise convolution, too
        kept = 16 - new[0].value_dim
        old[0].proj[0].weight[:, kept:] = 0
        net = new[0]
        net.num_heads = heads - 1
        rows(net.qkv, size * (heads - 1))
        rows(net.pe, kept)
        net.pe[0].groups = kept
        net.proj[0].weight = nn.Parameter(net.proj[0].weight[:, :kept])
        torch.testing.assert_close(new(x), old(x), rtol=1e-12, atol=1e-11)


def rows(layers, count):
    """Keep the first channels of a convolution and its norm."""
    for name in ("weight", "bias", "running_mean", "running_var"):
        for layer in layers:
            value = getattr(layer, name, None)
            if value is not None:
                setattr(layer, name, nn.Parameter(value[:count]) if name in ("weight", "bias") else value[:count])


def test_checkpoints_need_a_factory_that_rewrites(tmp_path):
    def rewritten():
        explicit_attention(model := nn.Sequential(Attention(16, 2)))
        return model

    model = rewritten().eval()
    save_pruned(model, tmp_path / "model.pt")
    assert_same(model, load_pruned(rewritten, tmp_path / "model.pt"))
    with pytest.raises(ValueError, match="explicit_attention was called on the network, the factory must call it, too"):
        load_pruned(lambda: nn.Sequential(Attention(16, 2)), tmp_path / "model.pt")


def test_ultralytics():
    block = pytest.importorskip("ultralytics.nn.modules.block")
    for made in (block.Attention(16, 2), block.AAttn(16, 2), block.AAttn(16, 4, 4)):
        old = nn.Sequential(made).double()
        for p in old.parameters():
            nn.init.normal_(p)
        same_on_maps(old, torch.randn(2, 16, 4, 6, dtype=torch.double))


def test_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=20, bos_token_id=0, eos_token_id=1
    )
    old = transformers.GPT2LMHeadModel(config).double().eval()
    for p in old.parameters():
        nn.init.normal_(p, std=0.3)
    new, x = copied(old), {"input_ids": torch.randint(0, 50, (2, 7)), "use_cache": False}
    assert len(explicit_attention(new, x).rewritten) == 8
    torch.testing.assert_close(new(**x).logits, old(**x).logits, rtol=1e-12, atol=1e-12)
