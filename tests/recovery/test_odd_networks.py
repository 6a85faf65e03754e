"""Recovery of networks, batches and callers out of the ordinary."""

import copy

import pytest
import torch
from torch import nn

from helpers.states import same_state, state
from tp_importance import Budget, Recovery, prune, recover
from tp_importance.core.guards import written
from tp_importance.recovery.features import common_features, feature_losses, output_loss
from tp_importance.recovery.samples import divided, mixed, steps

QUICK = Recovery(epochs=15, lr=5e-3, augment=None, autocast=False, batch_size=32)


def convolutions():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, padding=1)]
    return nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


def spoilt(dense):
    """A copy with other weights, in place of one that was pruned."""
    model, generator = copy.deepcopy(dense), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_((0.3 * p.float().abs().mean() * torch.randn(p.shape, generator=generator)).to(p.dtype))
    return model


def images(n=128, seed=0):
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


LOADER = list(images().split(32))


class Encoder(nn.Module):
    """A transformer whose padding is masked."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.embed, self.encoder, self.head = nn.Embedding(20, 16), nn.TransformerEncoder(layer, 2), nn.Linear(16, 4)

    def forward(self, input_ids, attention_mask):
        return self.head(self.encoder(self.embed(input_ids), src_key_padding_mask=attention_mask == 0)[:, 0])


def sentences(lengths=(10, 10, 10, 10)):
    generator = torch.Generator().manual_seed(0)
    for t in lengths:
        ids = torch.randint(0, 20, (32, t), generator=generator)
        long = torch.randint(3, t + 1, (32, 1), generator=generator)
        yield {"input_ids": ids, "attention_mask": (torch.arange(t) < long).long(), "labels": torch.zeros(32)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    dense = convolutions().to(dtype)
    model = spoilt(dense)
    report = recover(model, dense, LOADER, QUICK)
    assert report.after < 0.6 * report.before and report.epochs == 15 and not report.stopped
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_autocast_of_float16_is_refused():
    dense = convolutions().half()
    with pytest.raises(ValueError, match="autocast=True is for float32 weights, and those of Sequential are float16"):
        recover(spoilt(dense), dense, LOADER, Recovery(autocast=True))


@pytest.mark.parametrize("caller", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16), torch.no_grad])
def test_the_caller_s_modes_do_not_matter(caller):
    dense = convolutions()
    alone, inside = spoilt(dense), spoilt(dense)
    recover(alone, dense, LOADER, QUICK)
    with caller():
        report = recover(inside, dense, LOADER, QUICK)
    assert report.after < 0.6 * report.before and same_state(inside, state(alone))


@pytest.mark.parametrize("lengths", [(10, 10, 10, 10), (10, 9, 8, 10, 9, 7)])
def test_padded_transformers(lengths):
    torch.manual_seed(0)
    dense = Encoder()
    loader = list(sentences(lengths))
    fast = torch.backends.mha.get_fastpath_enabled()
    report = recover(spoilt(dense), dense, loader, QUICK)
    assert report.features == ["encoder.layers.0", "encoder"] and report.after < 0.6 * report.before
    assert torch.backends.mha.get_fastpath_enabled() is fast


def test_tokens_that_do_not_count_are_not_compared():
    marks = torch.tensor([[True, False], [True, True]])
    x = torch.randn(2, 2, 3)
    y = x.clone()
    y[0, 1] = 7.0
    with torch.no_grad():
        assert feature_losses({"a": x}, {"a": y}, {"a": None}, marks) == 0
        assert output_loss(x, y, 4.0, marks) == 0 and output_loss(x, y, 4.0) > 0
        y[1, 0] += 1  # features of tokens are no logits, with padding as without
        expected = (x - y)[marks].square().sum() / y[marks].square().sum()
        torch.testing.assert_close(output_loss(x, y, 4.0, marks), expected)


def test_networks_that_draw_random_numbers():
    class Random(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = convolutions()

        def forward(self, x):
            return self.net(nn.functional.dropout(x, 0.2))

    dense, found = Random(), []
    for _ in range(2):
        model, before = spoilt(dense), torch.get_rng_state()
        recover(model, dense, LOADER, QUICK)
        assert torch.equal(before, torch.get_rng_state())
        found.append(state(model))
        torch.rand(3)
    assert same_state(model, found[0])


def test_what_a_network_keeps_of_a_pass():
    class Keeping(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.last = convolutions(), None

        def forward(self, x):
            self.last = self.net[0](x)
            return self.net(x)

    calls = []

    def augment(batch, generator):
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("enough")
        return batch

    dense = Keeping()
    model = spoilt(dense)
    with pytest.raises(RuntimeError, match="enough"):
        recover(model, dense, LOADER, Recovery(augment=augment, autocast=False))
    assert model.last is None and dense.last is None
    recover(model, dense, LOADER, QUICK)
    assert copy.deepcopy(model).last is not None and dense.last is None


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weights_that_hooks_compute_are_those_of_the_result():
    model, dense = convolutions(), convolutions()
    for network in (model, dense):
        nn.utils.weight_norm(network[3])
    with torch.no_grad():
        model[3].weight_v.add_(0.1 * torch.randn(8, 8, 3, 3, generator=torch.Generator().manual_seed(0)))
    report = recover(model, dense, LOADER, QUICK)
    left = model[3].weight.detach().clone()
    model(LOADER[0])
    assert report.after < report.before and torch.equal(left, model[3].weight)


def test_sparse_gradients_and_expanded_buffers():
    dense = nn.Sequential(nn.EmbeddingBag(20, 8, sparse=True), nn.Linear(8, 3))
    dense.register_buffer("ones", torch.ones(1).expand(4))
    ids = [torch.randint(0, 20, (32, 5), generator=torch.Generator().manual_seed(i)) for i in range(4)]
    model = spoilt(dense)
    report = recover(model, dense, ids, QUICK)
    assert report.after < report.before and model.ones.stride() == (0,)
    with pytest.raises(RuntimeError, match="inside"), written(model.buffers()):
        raise RuntimeError("inside")


def test_frozen_batch_norms_keep_their_statistics():
    dense = convolutions()
    model = spoilt(dense)
    model[1].requires_grad_(False)
    before, other = state(model[1]), spoilt(dense)
    recover(model, dense, LOADER, QUICK)
    recover(other, dense, LOADER, QUICK)
    assert same_state(model[1], before) and not torch.equal(other[1].running_mean, before["running_mean"])


def test_a_network_that_lacks_nothing_is_not_trained(caplog):
    dense = convolutions()
    report = recover(copy.deepcopy(dense), dense, LOADER, True)
    assert report.before == report.after == report.epochs == 0 and "gives what the dense network" in str(report)
    assert not caplog.records


def test_batches_that_cannot_be_cut_make_one_step_each():
    """So the learning rate falls to zero, and epochs are counted right."""
    loader = [(batch, None) for batch in images(256).split(64)]
    dense = convolutions()
    assert recover(spoilt(dense), dense, loader, QUICK).epochs == 15
    for batch in (loader[0], images(70), images(32)):
        assert steps(batch, 32) == len(mixed(batch, 32, torch.Generator().manual_seed(0)))


def test_samples_that_do_not_fit_together_are_divided_as_well():
    batches = [torch.arange(100.0 * i, 100 * i + 40).view(40, 1).expand(40, 2 + i % 2) for i in range(4)]
    train, choose = divided(batches, 0.1, 32, torch.Generator().manual_seed(0))
    chosen, rest = ([x for b in side for x in b[:, 0].tolist()] for side in (choose, train))
    assert len(chosen) == 16 and sorted(chosen + rest) == [x for b in batches for x in b[:, 0].tolist()]
    uncut = [(torch.zeros(40, 2), str(i)) for i in range(10)]
    train, choose = divided(uncut, 0.1, 32, torch.Generator().manual_seed(0))
    assert len(choose) == 1 and sorted(name for _, name in (*train, *choose)) == list("0123456789")
    assert divided(uncut[:3], 0.1, 32, torch.Generator()) == (uncut[:3], uncut[:3])


def test_channels_of_signals_are_told():
    torch.manual_seed(0)
    layers = [nn.Conv1d(2, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 8, 3, padding=1), nn.ReLU()]
    dense = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 16, 3)).eval()
    model, loader = copy.deepcopy(dense), list(torch.randn(128, 2, 16).split(32))
    prune(model, loader[0][:2], loader, budget=Budget(macs=0.5), refit=None, method="l1")
    assert model[0].out_channels < 8
    with torch.no_grad():
        found = common_features(dense, model, lambda network: network(loader[0]))
        ours, theirs = model[0](loader[0]), dense[0](loader[0])
        assert set(found) >= {"0", "1", "2"}  # what is left of them is as it was
        assert feature_losses({"0": ours}, {"0": theirs}, {"0": found["0"]}) < 1e-10
    torch.testing.assert_close(dense[0].weight[found["0"]], model[0].weight)
