"""What a layer sees, unfolded to rows, and which features a channel fills."""

import pytest
import torch
from torch import nn

from helpers.consumer_cases import generator
from tp_importance.graph.patches import bn_gain, consumer_weight, feature_channels, unfolded_input

LAYERS = {
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1), (9,)),
    "conv2d": (nn.Conv2d(4, 6, 3), (7, 6)),
    "conv2d without bias": (nn.Conv2d(4, 6, 1, bias=False), (5, 5)),
    "conv2d of all kinds": (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2), groups=2), (9, 8)),
    "depthwise": (nn.Conv2d(4, 4, 3, padding=1, groups=4), (5, 6)),
    "depthwise multiplier": (nn.Conv2d(4, 8, 3, padding=1, groups=4), (5, 6)),
    "conv3d": (nn.Conv3d(2, 3, 2, stride=(1, 2, 1), padding=1, groups=1), (4, 5, 3)),
    "reflect": (nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="reflect"), (7, 6)),
    "replicate": (nn.Conv2d(4, 6, 5, stride=2, padding=2, padding_mode="replicate"), (7, 6)),
    "circular": (nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular"), (8,)),
    "same": (nn.Conv2d(4, 6, 3, padding="same", dilation=2), (7, 6)),
    "same, even kernel": (nn.Conv2d(4, 6, (2, 4), padding="same"), (7, 6)),
    "same, even kernel, circular": (nn.Conv2d(4, 6, (4, 3), padding="same", padding_mode="circular"), (7, 6)),
    "valid": (nn.Conv2d(4, 6, 3, padding="valid"), (7, 6)),
    "transposed1d": (nn.ConvTranspose1d(4, 6, 4, stride=2, padding=1), (5,)),
    "transposed2d": (nn.ConvTranspose2d(4, 6, 2, stride=2), (5, 4)),
    "transposed2d of all kinds": (
        nn.ConvTranspose2d(4, 6, 3, stride=(2, 3), padding=1, output_padding=(1, 2), dilation=(2, 1), groups=2),
        (5, 4),
    ),
    "transposed depthwise": (nn.ConvTranspose2d(4, 4, 3, stride=2, groups=4), (4, 4)),
    "transposed3d": (nn.ConvTranspose3d(2, 3, 2, stride=2, padding=1), (3, 4, 3)),
}
LINEAR = {"features": (8,), "tokens": (5, 8), "windows": (3, 4, 8)}


def inputs(module, shape):
    return torch.randn(3, module.in_channels, *shape, generator=generator(1))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", LAYERS)
def test_unfolded_input_times_weight_is_the_output(name):
    module, shape = LAYERS[name]
    x = inputs(module, shape)
    with torch.no_grad():
        out = module(x)
        u, weight = unfolded_input(module, x, out, None, generator()), consumer_weight(module)
        assert u.shape == (len(x), out[0, 0].numel(), module.groups, weight.shape[2])
        assert weight.shape[:2] == (module.groups, module.out_channels // module.groups)
        again = torch.einsum("nqgd,god->nqgo", u, weight).flatten(2)
        again = again if module.bias is None else again + module.bias
        torch.testing.assert_close(again.transpose(1, 2), out.flatten(2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", LINEAR.values(), ids=list(LINEAR))
def test_unfolded_input_of_linear_layers(shape):
    module, x = nn.Linear(8, 6), torch.randn(3, *shape, generator=generator())
    with torch.no_grad():
        out = module(x)
        u = unfolded_input(module, x, out, None, generator())
        again = torch.einsum("nqgd,god->nqgo", u, consumer_weight(module)).flatten(2) + module.bias
        torch.testing.assert_close(again, out.view(3, -1, 6))


@pytest.mark.parametrize("name", ["conv1d", "conv2d of all kinds", "conv3d", "reflect", "transposed2d of all kinds"])
def test_sampled_rows_are_rows_of_their_sample(name):
    module, shape = LAYERS[name]
    x = inputs(module, shape)
    out = module(x).detach()
    everything = unfolded_input(module, x, out, None, generator())
    sampled = unfolded_input(module, x, out, 3, generator(7))
    assert sampled.shape == (len(x), 3, *everything.shape[2:])
    for mine, rows in zip(sampled, everything, strict=True):
        assert all((row == rows).flatten(1).all(1).any() for row in mine)
    assert torch.equal(sampled, unfolded_input(module, x, out, 3, generator(7)))
    assert not torch.equal(sampled, unfolded_input(module, x, out, 3, generator(8)))


def test_sampled_tokens_are_tokens():
    module, x = nn.Linear(8, 6), torch.randn(3, 5, 8, generator=generator())
    sampled = unfolded_input(module, x, module(x), 2, generator()).squeeze(2)
    assert all((row == tokens).all(1).any() for mine, tokens in zip(sampled, x, strict=True) for row in mine)


def test_samples_have_positions_of_their_own_and_all_positions_occur():
    module = nn.Conv2d(1, 1, 1)
    x = torch.arange(16.0).view(1, 1, 4, 4).expand(200, -1, -1, -1)
    seen = unfolded_input(module, x, module(x), 4, generator()).flatten(1)
    assert len(seen.unique(dim=0)) > 150 and seen.unique().tolist() == list(range(16))


@pytest.mark.parametrize("positions", [16, 17, 1000])
def test_no_more_positions_than_there_are(positions):
    module, x = nn.Conv2d(2, 3, 1), torch.randn(2, 2, 4, 4, generator=generator())
    out = module(x)
    everything = unfolded_input(module, x, out, None, generator())
    assert torch.equal(unfolded_input(module, x, out, positions, generator()), everything)


@pytest.mark.parametrize("name", ["conv2d of all kinds", "depthwise", "transposed2d of all kinds", "transposed3d"])
def test_feature_channels_say_which_features_a_channel_fills(name):
    module, shape = LAYERS[name]
    x = inputs(module, shape).abs() + 1
    out = module(x).detach()
    channels = feature_channels(module)
    for channel in range(module.in_channels):
        only = torch.zeros_like(x)
        only[:, channel] = x[:, channel]
        filled = unfolded_input(module, only, out, None, generator()).abs().sum((0, 1)) > 0
        assert torch.equal(filled, channels == channel)


@pytest.mark.parametrize("affine", [False, True])
def test_bn_gain(affine):
    bn = nn.BatchNorm2d(5, affine=affine).eval()
    bn.running_var.copy_(torch.rand(5, generator=generator()) * 3)
    bn.running_mean.normal_()
    if affine:
        nn.init.normal_(bn.weight)
        nn.init.normal_(bn.bias)
    x = torch.randn(4, 5, 3, 3)
    with torch.no_grad():
        expected = (bn(x + 1) - bn(x))[0, :, 0, 0]
    torch.testing.assert_close(bn_gain(bn, 5).float(), expected, rtol=1e-4, atol=1e-5)


def test_no_gain_without_a_batch_norm():
    for module in (None, nn.ReLU(), nn.BatchNorm2d(5, track_running_stats=False)):
        assert torch.equal(bn_gain(module, 5), torch.ones(5))
