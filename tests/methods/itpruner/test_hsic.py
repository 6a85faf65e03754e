import numpy as np
import pytest
import torch
from torch import Tensor

from tp_importance.methods.itpruner.hsic import HSICSums, centred_gram, cross_hsic, gram, importance_weights, relevance

N = 12


def features(seed: int = 0, n: int = N, dims: tuple[int, ...] = (3, 7, 40)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    return [
        (common @ torch.randn(3, d, generator=generator, dtype=torch.float64)).relu()
        + torch.randn(n, d, generator=generator, dtype=torch.float64)
        for d in dims
    ]


def naive_gram(x: Tensor, kernel: str) -> np.ndarray:
    n = len(x)
    if kernel == "linear":
        return np.array([[float((x[i] * x[j]).sum()) for j in range(n)] for i in range(n)])
    distance = np.array([[float(((x[i] - x[j]) ** 2).sum()) for j in range(n)] for i in range(n)])
    sigma = torch.tensor([distance[i, j] for i in range(n) for j in range(n) if i != j]).median().item()
    return np.exp(-distance / sigma)


def naive_hsic(k: np.ndarray, m: np.ndarray, estimator: str) -> float:
    """Double loop for the biased one, the formula of Song et al. (2012) for the unbiased one."""
    n = len(k)
    if estimator == "biased":
        total = 0.0
        for i in range(n):
            for j in range(n):
                total += (k[i, j] - k[i].mean() - k[:, j].mean() + k.mean()) * m[i, j]
        return total / n**2
    k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
    one = np.ones(n)
    cross = one @ k @ one * (one @ m @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ m @ one)
    return float((np.trace(k @ m) + cross) / (n * (n - 3)))


def nhsic(values: list[Tensor], **options) -> np.ndarray:
    grams = [centred_gram(x, **options) for x in values]
    return HSICSums().update(grams, options.get("estimator", "biased")).normalised()


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_against_a_double_loop(estimator, kernel):
    values = features()
    grams = [naive_gram(x, kernel) for x in values]
    expected = np.array([[naive_hsic(a, b, estimator) for b in grams] for a in grams])
    found = cross_hsic(values, kernel=kernel, estimator=estimator).numpy() / (
        N**2 if estimator == "biased" else N * (N - 3)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    scale = np.sqrt(expected.diagonal())
    np.testing.assert_allclose(
        nhsic(values, kernel=kernel, estimator=estimator), expected / np.outer(scale, scale), rtol=1e-9
    )


def test_biased_is_a_similarity():
    found = nhsic(features())
    np.testing.assert_allclose(found.diagonal(), 1.0)
    assert (found >= 0).all() and (found <= 1 + 1e-12).all()
    np.testing.assert_allclose(found, found.T)


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_invariances(estimator):
    values = features()
    rotation, _ = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))
    moved = [values[0] * 5, values[1] @ rotation, values[2] - 3 + torch.zeros(N, 1)]
    np.testing.assert_allclose(nhsic(moved, estimator=estimator), nhsic(values, estimator=estimator), rtol=1e-9)
    padded = [torch.cat([x, torch.ones(N, 2)], 1) for x in values]  # constant features count for nothing
    np.testing.assert_allclose(nhsic(padded, estimator=estimator), nhsic(values, estimator=estimator), rtol=1e-9)


def test_feature_form_is_gram_form():
    values = features(n=200, dims=(3, 7, 20))
    grams = torch.stack([centred_gram(x).flatten() for x in values])
    torch.testing.assert_close(cross_hsic(values), grams @ grams.mT)


def test_grams_add_up():
    a, b, c = features(dims=(3, 5000, 40))
    torch.testing.assert_close(gram(a) + gram(b) + gram(c), gram(torch.cat([a, b, c], 1)))
    assert gram(torch.full((4, 9), 0.1)).abs().max() == 0  # exactly, in float32 too
    far = features()[1]
    torch.testing.assert_close(centred_gram((far + 1000).float()), centred_gram(far), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 100])
def test_gram_is_the_full_product(n):
    x = torch.randn(n, 5000, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    shifted = x - x[:1]
    torch.testing.assert_close(gram(x), shifted @ shifted.mT)


def test_constant_means_constant_up_to_rounding_whatever_the_scale():
    far = 100 + 1e-5 * torch.randn(N, 50, generator=torch.Generator().manual_seed(0))  # float32: 1e-7 of the energy
    assert gram(far).abs().max() == 0
    values = features()
    small = [values[0] * 1e-8, *values[1:]]
    np.testing.assert_allclose(nhsic(small), nhsic(values), rtol=1e-9)
    assert gram(torch.full((3, 2), torch.nan)).isnan().all()


@pytest.mark.parametrize(("d", "expected"), [(64, 0.39), (1000, 0.91), (16384, 0.994)])
@pytest.mark.parametrize("relu", [False, True])
def test_the_biased_estimator_saturates(d, expected, relu):
    """Two independent feature sets of n = 100 samples score d / (d + n), a little less behind a ReLU."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(100, d, generator=generator) for _ in range(2)]
    values = [x.relu() for x in values] if relu else values
    assert nhsic(values)[0, 1] == pytest.approx(expected, abs=0.04)
    assert abs(nhsic(values, estimator="unbiased")[0, 1]) < 0.05


def test_streaming():
    batches = [features(seed) for seed in range(3)]
    sums = HSICSums()
    for values in batches:
        sums.update([centred_gram(x, estimator="unbiased") for x in values], "unbiased")
    totals = sum(cross_hsic(values, estimator="unbiased") for values in batches).numpy()
    scale = np.sqrt(totals.diagonal())
    np.testing.assert_allclose(sums.normalised(), totals / np.outer(scale, scale), rtol=1e-9)


def test_streaming_unbiased_approaches_the_whole():
    def draw(n: int, seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(n, 5, generator=generator, dtype=torch.float64)
        return [x, x[:, :2].relu()]

    whole = nhsic(draw(2000, 0), estimator="unbiased")[0, 1]
    sums = {"biased": HSICSums(), "unbiased": HSICSums()}
    for seed in range(400):
        for estimator, s in sums.items():
            s.update([centred_gram(x, estimator=estimator) for x in draw(8, seed)], estimator)
    assert sums["unbiased"].normalised()[0, 1] == pytest.approx(whole, abs=0.04)
    assert sums["biased"].normalised()[0, 1] > whole + 0.05


def test_relevance():
    constant = [*features()[:2], torch.ones(N, 3)]
    t = relevance(nhsic(constant))
    np.testing.assert_allclose(t, [0.5, 0.5, 0.0])
    assert relevance(nhsic([constant[0], constant[2]])).tolist() == [1.0, 0.0]
    assert relevance(nhsic(constant[:1])).tolist() == [1.0]
    with pytest.raises(ValueError, match="constant"):
        relevance(nhsic([torch.ones(N, 3), torch.zeros(N, 1)]))
    with pytest.raises(ValueError, match="shares"):
        relevance(np.array([[1.0, -0.2], [-0.2, 1.0]]))
    with pytest.raises(ValueError, match="no batch"):
        HSICSums().normalised()


def test_weights():
    t = np.array([0.2, 0.3, 0.5])
    assert importance_weights(t, 0.0).tolist() == [1.0, 1.0, 1.0]
    for beta in (-10.0, 3.0, 1000.0):
        alpha = importance_weights(t, beta)
        assert alpha.max() == 1.0 and (alpha > 0).all()
        np.testing.assert_allclose(np.log(alpha[0] / alpha[2]), -beta * (t[0] - t[2]))
    for beta in (float("nan"), float("inf"), 1e6):
        with pytest.raises(ValueError, match="beta"):
            importance_weights(t, beta)


def test_too_few_samples():
    for n, estimator in ((1, "biased"), (3, "unbiased")):
        with pytest.raises(ValueError, match="samples"):
            centred_gram(torch.randn(n, 4), estimator=estimator)
    with pytest.raises(ValueError, match="different numbers"):
        cross_hsic([torch.randn(4, 2), torch.randn(5, 2)])
