import itertools

import numpy as np
import pytest
import torch
from torch import nn

from tp_importance.methods.resconv.fusion import (
    cheapest_removal,
    fused_kernel,
    layer_loss,
    scaled_batchnorm,
    soft_threshold,
)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def naive(weight, bias, s, a, groups, mean, var, gamma, beta, eps):
    """The formula of the fusion, element by element."""
    channels, per_group, height, width = weight.shape
    kernel, shift = torch.zeros_like(weight), torch.zeros(channels, dtype=weight.dtype)
    for o in range(channels):
        g = 1.0 if var is None else float((1.0 if gamma is None else gamma[o]) / (var[o] + eps) ** 0.5)
        if var is not None:
            shift[o] = s * ((0.0 if beta is None else beta[o]) - g * mean[o])
        shift[o] += 0.0 if bias is None else s * g * bias[o]
        for i, u, v in itertools.product(range(per_group), range(height), range(width)):
            kernel[o, i, u, v] = s * g * weight[o, i, u, v]
            if i == o % per_group and (u, v) == (height // 2, width // 2):
                kernel[o, i, u, v] += a
    return kernel, shift


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("size", [(1, 1), (3, 3), (5, 1), (3, 7)])
@pytest.mark.parametrize("norm", ["none", "statistics", "affine", "gamma only"])
@pytest.mark.parametrize("bias", [True, False])
def test_fused_kernel_is_the_formula(groups, size, norm, bias):
    weight, b = draw(6, 6 // groups, *size), draw(6, seed=1) if bias else None
    mean, var = (None, None) if norm == "none" else (draw(6, seed=2), draw(6, seed=3).square() + 0.1)
    gamma = draw(6, seed=4) if norm in ("affine", "gamma only") else None
    beta = draw(6, seed=5) if norm == "affine" else None
    got = fused_kernel(
        weight,
        b,
        -0.7,
        1.3,
        groups=groups,
        mean=mean,
        var=var,
        gamma=gamma,
        beta=beta,
        eps=1e-3 if norm != "none" else 0,
    )
    expected = naive(weight, b, -0.7, 1.3, groups, mean, var, gamma, beta, 1e-3)
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_fused_kernel_in_any_dimension(dim):
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dim - 1](4, 4, 3, padding=1, groups=2).double()
    x = draw(2, 4, *[5] * dim)
    kernel, bias = fused_kernel(conv.weight, conv.bias, 0.5, 2.0, groups=2)
    expected = 0.5 * conv(x) + 2.0 * x
    conv.weight.data, conv.bias.data = kernel, bias
    torch.testing.assert_close(conv(x), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_fused_kernel_keeps_dtype_and_gradients_out(dtype):
    weight = draw(4, 4, 3, 3, dtype=torch.float32).to(dtype).requires_grad_()
    kernel, bias = fused_kernel(weight, None, 1.0, 0.0)
    assert kernel.dtype == bias.dtype == dtype and not kernel.requires_grad
    assert torch.equal(kernel, weight.detach()) and not bias.any()
    assert kernel.data_ptr() != weight.data_ptr()


@pytest.mark.parametrize(
    ("shape", "groups"), [((4, 3, 3, 3), 1), ((4, 4, 2, 3), 1), ((4, 4, 3, 3), 2), ((4, 4, 4, 4), 1)]
)
def test_fused_kernel_refuses(shape, groups):
    with pytest.raises(ValueError, match=rf"shape \({shape[0]}, {shape[1]}.*groups={groups}"):
        fused_kernel(torch.zeros(shape), None, 1.0, 1.0, groups=groups)


def test_scaled_batchnorm():
    bn = nn.BatchNorm2d(5, eps=1e-2).double().eval()
    x, r = draw(3, 5, 4, 4), draw(5, seed=1).exp()
    mean, var, gamma = draw(5, seed=2), draw(5, seed=3).square(), draw(5, seed=4)
    mean[0], var[1], var[2] = 0.0, 0.0, 1e-5  # dead channels: their variance cannot be scaled by r > 1
    r[1], r[2] = 3.0, 50.0
    bn.running_mean, bn.running_var, bn.weight.data = mean, var, gamma
    expected = bn(x)
    bn.running_mean, bn.running_var, scaled = scaled_batchnorm(mean, var, gamma, bn.eps, r)
    assert (bn.running_var >= 0).all()
    kept = torch.tensor([True, False, False, True, True])
    assert torch.equal(scaled[kept], gamma[kept]) and not torch.equal(scaled[~kept], gamma[~kept])
    bn.weight.data = scaled
    torch.testing.assert_close(bn(x / r.view(-1, 1, 1)), expected, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="no weight"):
        scaled_batchnorm(mean, var, None, bn.eps, r)
    assert scaled_batchnorm(mean, var + 1, None, bn.eps, r.clamp(max=2))[2] is None


def test_soft_threshold_is_the_proximal_map():
    v, grid = draw(50), torch.linspace(-5, 5, 200_001, dtype=torch.float64)
    for amount in (0.0, 0.3, 2.0):
        got = soft_threshold(v, amount)
        for x, y in zip(v, got, strict=True):  # argmin_z (z − v)² / 2 + amount |z|
            best = grid[((grid - x).square() / 2 + amount * grid.abs()).argmin()]
            assert abs(best - y) < 1e-4
        assert torch.equal(got == 0, v.abs() <= amount)


def test_layer_loss():
    assert layer_loss(0.5, 2.0, 3.0, 4.0) == pytest.approx(0.5 * 3 / (2 * 4))
    assert layer_loss(-0.5, 2.0, 3.0, 4.0) == layer_loss(0.5, 2.0, 3.0, 4.0)
    assert layer_loss(0.5, 0.0, 3.0, 4.0) == layer_loss(0.5, 1.0, 3.0, 4.0)
    assert layer_loss(0.0, 2.0, 3.0, 4.0) == 0
    for a, stream in ((-1e-9, 1.0), (1.0, 0.0), (1.0, float("nan")), (float("nan"), 1.0)):
        with pytest.raises(ValueError, match="a="):
            layer_loss(1.0, a, 1.0, stream)


# --- the knapsack -----------------------------------------------------------------------------------------------------


def brute_force(losses, savings, needed):
    sets = itertools.chain.from_iterable(itertools.combinations(range(len(losses)), n) for n in range(len(losses) + 1))
    enough = [z for z in sets if all(sum(savings[f][i] for i in z) >= least for f, least in needed.items())]
    return min(sum(losses[i] for i in z) for z in enough)


@pytest.mark.parametrize("seed", range(60))
def test_cheapest_removal_is_optimal(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 10))
    # of like size, or of all sizes: a layer whose a is still tiny has a huge loss
    losses = [rng.uniform(0, 1, n), 10 ** rng.uniform(-6, 6, n), rng.integers(0, 3, n).astype(float)][seed % 3]
    savings = {"macs": rng.integers(1, 10**9, n), "params": rng.choice([36, 144, 590_080], n)}
    subset = rng.random(n) < 0.5
    subset[0] = True
    needed = {f: float(row[subset].sum() + seed % 2) for f, row in savings.items()}  # exactly, or one too many
    if any(row.sum() < needed[f] for f, row in savings.items()):
        needed = {f: float(row.sum()) for f, row in savings.items()}
    got = cheapest_removal(losses, savings, needed)
    assert all(savings[f][got].sum() >= least for f, least in needed.items())
    assert list(got) == sorted(set(got.tolist()))
    assert losses[got].sum() == pytest.approx(brute_force(losses, savings, needed), rel=1e-7, abs=1e-12)


def test_one_short_is_short():
    """The solver takes 1e-6 for nothing; a budget does not."""
    assert cheapest_removal([1, 2], {"macs": [10**9, 10**9 + 1]}, {"macs": 10**9 + 1}).tolist() == [1]
    assert cheapest_removal([1, 2, 9], {"macs": [10**9] * 3}, {"macs": 10**9 + 1}).tolist() == [0, 1]


def test_a_huge_loss_does_not_hide_the_others():
    assert cheapest_removal([1e12, 3.0, 2.0, 1.0], {"macs": [9, 5, 5, 5]}, {"macs": 10}).tolist() == [2, 3]


def test_of_equal_losses_the_smallest_saving():
    assert cheapest_removal([0, 0, 0], {"macs": [70, 30, 50]}, {"macs": 40}).tolist() == [2]
    assert cheapest_removal([1.0, 1.0], {"macs": [70, 50]}, {"macs": 40}).tolist() == [1]


def test_everything_is_needed():
    times = [0.1, 0.2, 0.3, 0.7, 1e-9]
    assert len(cheapest_removal([5, 4, 3, 2, 1], {"latency_ms": times}, {"latency_ms": sum(times)})) >= 4
    assert cheapest_removal([3.0], {"macs": [5]}, {"macs": 5}).tolist() == [0]


def test_nothing_is_needed():
    for needed in ({}, {"macs": 0.0}, {"macs": -5.0}):
        assert cheapest_removal([1.0, 2.0], {"macs": [1, 2]}, needed).tolist() == []
    assert cheapest_removal([], {"macs": []}, {"macs": 0.0}).tolist() == []


def test_cheapest_removal_refuses():
    with pytest.raises(ValueError, match="all 2 layers together save 3 macs, needed are 4"):
        cheapest_removal([1.0, 1.0], {"macs": [1, 2]}, {"macs": 4})
    for bad in (np.nan, np.inf, -1.0):
        with pytest.raises(ValueError, match="losses"):
            cheapest_removal([1.0, bad], {"macs": [1, 2]}, {"macs": 1})
