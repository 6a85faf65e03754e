import copy
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchvision.models import resnet18

from tp_importance.maths.batchnorm import ChannelMoments as Moments
from tp_importance.statistics.batchnorm import recalibrate_batchnorm


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def network(first=nn.BatchNorm2d):
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        first(6),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Conv2d(6, 4, 3, stride=2),
        nn.BatchNorm2d(4, momentum=None),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 5),
        nn.BatchNorm1d(5),
    )


def images(n=37):
    return torch.randn(n, 3, 11, 11) * torch.tensor([1.0, 5.0, 0.1]).view(3, 1, 1) + 3


def buffers(model):
    return {name: b.clone() for name, b in model.named_buffers()}


def assert_identical(before, after):
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].dtype == after[name].dtype
        assert before[name].numpy().tobytes() == after[name].numpy().tobytes(), name


def oracle(layer, x):
    """What PyTorch's own layer says about one huge batch with momentum 1."""
    twin = copy.deepcopy(layer).double().train()
    twin.momentum = 1.0
    with torch.no_grad():
        twin(x.double())
    return twin.running_mean, twin.running_var


@pytest.mark.parametrize("sizes", [(37,), (20, 17), (2, 30, 5), (12, 12, 12, 1)])
def test_first_layer_is_the_single_huge_batch(sizes):
    net, x = network(), images()
    net[9] = nn.Identity()  # a batch of one has no variance there
    recalibrate_batchnorm(net, list(x.split(sizes)))
    mean, var = oracle(net[1], net[0](x).detach())
    torch.testing.assert_close(net[1].running_mean, mean.float(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(net[1].running_var, var.float(), rtol=1e-6, atol=0)
    assert net[1].num_batches_tracked == len(sizes)


def test_order_of_batches_does_not_matter_to_the_first_layer():
    net, x = network(), list(images().split((20, 3, 14)))
    first = buffers(recalibrate_batchnorm(net, x))
    second = buffers(recalibrate_batchnorm(net, x[::-1]))
    torch.testing.assert_close(first["1.running_var"], second["1.running_var"], rtol=1e-6, atol=0)


def test_deeper_layers_see_batch_normalised_inputs_without_dropout():
    net, batches = network().train(), list(images().split((20, 17)))
    recalibrate_batchnorm(net, batches)
    with torch.no_grad():
        inputs = []
        for x in batches:
            h = net[0](x)
            h = F.relu(F.batch_norm(h, None, None, net[1].weight, net[1].bias, training=True))
            inputs.append(net[4](h))
    mean, var = oracle(net[5], torch.cat(inputs))
    torch.testing.assert_close(net[5].running_mean, mean.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(net[5].running_var, var.float(), rtol=1e-5, atol=0)


def test_repeatable_and_independent_of_old_statistics():
    net, batches = network(), list(images().split((20, 17)))
    first = buffers(recalibrate_batchnorm(net, batches))
    for b in net.buffers():
        b.fill_(7)
    assert_identical(first, buffers(recalibrate_batchnorm(net, batches)))


def test_no_cancellation_far_from_zero():
    x = torch.randn(4096, 2, dtype=torch.float64) + 1e8
    net = nn.Sequential(nn.BatchNorm1d(2)).double()
    recalibrate_batchnorm(net, x.split(100))
    torch.testing.assert_close(net[0].running_var, (x - 1e8).var(0), rtol=1e-6, atol=0)


def test_moments_merge():
    x = torch.randn(9, 3, 2, 2, dtype=torch.float64)
    parts = [Moments.of(p) for p in x.split((1, 5, 3))]
    left, right = parts[0].merged(parts[1]).merged(parts[2]), parts[0].merged(parts[1].merged(parts[2]))
    for pooled in (left, right):
        assert pooled.count == 36
        torch.testing.assert_close(pooled.mean, x.mean((0, 2, 3)))
        torch.testing.assert_close(pooled.variance, x.var((0, 2, 3)))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.BatchNorm1d, (9, 4)),
        (nn.BatchNorm1d, (9, 4, 5)),
        (nn.BatchNorm2d, (9, 4, 5, 5)),
        (nn.BatchNorm3d, (9, 4, 2, 3, 3)),
        (nn.SyncBatchNorm, (9, 4, 5, 5)),
        (partial(nn.BatchNorm2d, affine=False), (9, 4, 5, 5)),
    ],
)
def test_kinds_of_layers(layer, shape):
    net, x = nn.Sequential(layer(4)), torch.randn(shape) * 3 + 1
    recalibrate_batchnorm(net, x.split((4, 5)))
    dims = [0, *range(2, x.dim())]
    torch.testing.assert_close(net[0].running_mean, x.mean(dims))
    torch.testing.assert_close(net[0].running_var, x.var(dims))


def test_modes_flags_hooks_and_weights_stay():
    net = network().train()
    net[1].eval()
    net[0].requires_grad_(False)
    state = {n: p.clone() for n, p in net.named_parameters()}
    modes = [m.training for m in net.modules()]
    assert recalibrate_batchnorm(net, [images()]) is net
    assert [m.training for m in net.modules()] == modes
    assert [p.requires_grad for p in net[0].parameters()] == [False, False]
    assert (net[1].momentum, net[5].momentum) == (0.1, None)
    assert all(torch.equal(p, state[n]) and p.grad is None for n, p in net.named_parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in net.modules())


def test_does_not_touch_the_random_generator():
    net, batches = network().train(), [images()]
    before = torch.get_rng_state()
    recalibrate_batchnorm(net, batches)
    assert torch.equal(before, torch.get_rng_state())


def failing(batches, error):
    yield from batches
    raise error


@pytest.mark.parametrize("error", [RuntimeError("disk"), KeyboardInterrupt(), KeyError("x")])
def test_exception_of_the_loader_restores_everything(error):
    net = network().train()
    net(images())  # statistics of some value
    net[5].eval()
    before, modes = buffers(net), [m.training for m in net.modules()]
    with pytest.raises(type(error)) as caught:
        recalibrate_batchnorm(net, failing([images()], error))
    assert caught.value is error
    assert_identical(before, buffers(net))
    assert [m.training for m in net.modules()] == modes
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_exception_of_the_model_restores_everything():
    net = network()
    before = buffers(net)
    with pytest.raises(RuntimeError):
        recalibrate_batchnorm(net, [images(), torch.randn(4, 5, 11, 11)])
    assert_identical(before, buffers(net))


def test_nan_is_refused_and_restored():
    net, x = network(), images()
    before = buffers(net)
    x[3, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="layer '1': running_mean is not finite"):
        recalibrate_batchnorm(net, [images(), x])
    assert_identical(before, buffers(net))


def test_overflow_in_half_precision_is_refused_and_restored():
    net = nn.Sequential(nn.BatchNorm1d(2)).half()
    before = buffers(net)
    with pytest.raises(ValueError, match=r"running_var is not finite in torch\.float16"):
        recalibrate_batchnorm(net, [torch.tensor([[-4e4, 0.0], [4e4, 1.0]])])
    assert_identical(before, buffers(net))


@pytest.mark.parametrize("x", [torch.randn(1, 3), torch.randn(0, 3)])
def test_too_small_batch_names_the_layer(x):
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    before = buffers(net)
    with pytest.raises(ValueError, match=r"layer '1'.*drop_last"):
        recalibrate_batchnorm(net, [x, torch.randn(8, 3)])  # a last one joins the batch before it
    assert_identical(before, buffers(net))


@pytest.mark.parametrize("loader", [[], (x for x in ()), DataLoader(TensorDataset(torch.empty(0, 3)))])
def test_empty_loader(loader):
    net = network()
    before = buffers(net)
    with pytest.raises(ValueError, match="empty"):
        recalibrate_batchnorm(net, loader)
    assert_identical(before, buffers(net))


def test_refused_types():
    with pytest.raises(TypeError, match=r"pass \[batch\]"):
        recalibrate_batchnorm(network(), images())
    with pytest.raises(TypeError, match="iterable"):
        recalibrate_batchnorm(network(), 3)
    with pytest.raises(TypeError, match=r"nn\.Module"):
        recalibrate_batchnorm(lambda x: x, [images()])


@pytest.mark.parametrize("net", [nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False)])
def test_nothing_to_recalibrate_warns(net):
    with pytest.warns(UserWarning, match="nothing changed"):
        assert recalibrate_batchnorm(net, [torch.randn(4, 3)]) is net


class Odd(nn.Module):
    """A layer called twice, one with keywords, one never, one without statistics."""

    def __init__(self):
        super().__init__()
        self.shared = nn.BatchNorm1d(3)
        self.keyword = nn.BatchNorm1d(3)
        self.unused = nn.BatchNorm1d(3)
        self.free = nn.BatchNorm1d(3, track_running_stats=False)

    def forward(self, x):
        return self.free(self.shared(x) + self.shared(2 * x + 1) + self.keyword(input=x))


def test_shared_unused_keyword_and_untracked_layers():
    net, x = Odd(), torch.randn(20, 3)
    net.unused.running_mean.fill_(5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recalibrate_batchnorm(net, x.split((8, 12)))
    both = torch.cat([x, 2 * x + 1])
    torch.testing.assert_close(net.shared.running_mean, both.mean(0))
    torch.testing.assert_close(net.shared.running_var, both.var(0))
    torch.testing.assert_close(net.keyword.running_var, x.var(0))
    assert net.unused.running_mean.tolist() == [5, 5, 5] and net.unused.num_batches_tracked == 0
    assert net.shared.num_batches_tracked == 2
    assert net.free.running_mean is None


def test_layer_used_without_being_called_keeps_its_statistics():
    def forward(model, x):  # as fused implementations do
        bn = model.unused
        return model.shared(F.batch_norm(x, bn.running_mean, bn.running_var, training=bn.training))

    net = Odd()
    recalibrate_batchnorm(net, [torch.randn(4, 3)], forward_fn=forward)
    assert net.unused.running_mean.tolist() == [0, 0, 0]
    assert net.shared.num_batches_tracked == 1


def test_no_layer_called_warns():
    net = Odd()
    before = buffers(net)
    with pytest.warns(UserWarning, match="none of the 3"):
        recalibrate_batchnorm(net, [torch.randn(4, 3)], forward_fn=lambda model, batch: batch)
    assert_identical(before, buffers(net))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_accumulates_in_high(dtype):
    net = nn.Sequential(nn.BatchNorm2d(2)).to(dtype)
    x = (torch.randn(64, 2, 32, 32) + 2).to(dtype)
    recalibrate_batchnorm(net, x.float().split(16))  # moved to the dtype of the model
    assert net[0].running_var.dtype == dtype
    assert torch.equal(net[0].running_mean, x.double().mean((0, 2, 3)).to(dtype))
    assert torch.equal(net[0].running_var, x.double().var((0, 2, 3)).to(dtype))


@pytest.mark.parametrize("outer", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_frozen_and_grad_modes(outer):
    net, reference, x = network().requires_grad_(False), network(), images()
    reference.load_state_dict(net.state_dict())
    with outer():
        recalibrate_batchnorm(net, [x])
    assert_identical(buffers(recalibrate_batchnorm(reference, [x])), buffers(net))
    assert not any(p.requires_grad for p in net.parameters())
    net.train()(x)  # the buffers still take updates


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm1d(3)

    def forward(self, pixels):
        return self.bn(pixels)


class Stream(IterableDataset):
    def __iter__(self):
        yield from torch.arange(30.0).view(10, 3)


@pytest.mark.parametrize("kind", ["tensor", "pair", "list", "dict", "generator", "loader", "stream", "forward_fn"])
@pytest.mark.parametrize("progress", [False, True])
def test_forms_of_batches(kind, progress, capsys):
    x = torch.arange(30.0).view(10, 3)
    y = torch.zeros(10, dtype=torch.int64)
    loader, forward_fn = {
        "tensor": (x.split(6), None),
        "pair": ([(x[:6], y[:6]), (x[6:], y[6:])], None),
        "list": ([[x[:6]], [x[6:]]], None),
        "dict": ([{"pixels": x[:6], "labels": y[:6]}, {"pixels": x[6:], "label": y[6:]}], None),
        "generator": ((part for part in x.split(6)), None),
        "loader": (DataLoader(TensorDataset(x, y), batch_size=6), None),
        "stream": (DataLoader(Stream(), batch_size=6), None),
        "forward_fn": ([x[:6].numpy(), x[6:].numpy()], lambda model, batch: model(torch.from_numpy(batch))),
    }[kind]
    net = recalibrate_batchnorm(Named(), loader, forward_fn=forward_fn, progress=progress)
    torch.testing.assert_close(net.bn.running_mean, x.mean(0))
    torch.testing.assert_close(net.bn.running_var, x.var(0))
    assert bool(capsys.readouterr().err) is progress


def test_resnet_after_weight_change():
    """Eval mode with recalibrated statistics gives what batch statistics of the same single batch give."""
    net, x = resnet18(num_classes=4), torch.randn(32, 3, 64, 64)
    for p in net.parameters():
        p.data.mul_(1.5)
    recalibrate_batchnorm(net, [x])
    with torch.no_grad():
        batch, running = net.train()(x), net.eval()(x)
    # running_var is unbiased, the batch normalises with the biased variance: n/(n-1) at n = 128 in the last stage
    torch.testing.assert_close(running, batch, rtol=0.05, atol=0.05 * batch.abs().max().item())
