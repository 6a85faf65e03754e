"""Layers in front of recurrent ones: found, scored, counted and cut."""

import pytest
import torch
import torch_pruning as tp
from torch import nn

from tp_importance import Budget, CATROImportance, count_ops, prunable_groups, prune
from tp_importance.graph.patches import consumer_weight, feature_channels, unfolded_input
from tp_importance.host_pruners import label_groups


class Reader(nn.Module):
    """Words that a linear layer makes, and what a recurrent layer makes of them."""

    def __init__(self, kind=nn.LSTM, **options):
        super().__init__()
        self.words, self.reads = nn.Linear(6, 12), kind(12, 5, **options)
        self.head = nn.Linear(5 * (1 + options.get("bidirectional", False)), 4)

    def forward(self, x):
        if isinstance(self.reads, nn.RNNCellBase):
            state = self.reads(torch.relu(self.words(x[:, 0])))
            return self.head(state if isinstance(state, torch.Tensor) else state[0])
        x = x if self.reads.batch_first else x.transpose(0, 1)
        y = self.reads(torch.relu(self.words(x)))[0]
        return self.head(y[:, -1] if self.reads.batch_first else y[-1])


def made(*args, **options):
    torch.manual_seed(0)
    return Reader(*args, **options).eval()


GENERATOR = torch.Generator().manual_seed(0)
LOADER = [(torch.randn(16, 7, 6, generator=GENERATOR), torch.arange(16) % 4) for _ in range(3)]
X = LOADER[0][0][:2]
DEEP = {"batch_first": True, "bidirectional": True, "num_layers": 2}


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell])
@pytest.mark.parametrize("deep", [False, True])
def test_inputs_are_pruned_and_what_is_left_is_the_masked_network(kind, deep):
    model = made(kind, **(DEEP if deep and issubclass(kind, nn.RNNBase) else {}))
    groups = prunable_groups(model, X)  # verified: masked = removed, and the cost is exact
    assert groups.widths == {"words": 12} and groups["words"].consumers[0].name == "reads"
    report = prune(model, X, budget=Budget(params=0.9), method="l2", refit=None).report
    left = model.words.out_features
    assert left < 12 and model.reads.input_size == left and model(X).shape == (2, 4)
    assert (report.cost.macs, report.cost.params) == count_ops(model, X)


@pytest.mark.parametrize("method", ["obs", "catro", "itpruner", "psap", "taylor", CATROImportance(space="channel")])
@pytest.mark.parametrize("batch_first", [False, True])
def test_all_methods_score_them(method, batch_first):
    """A channel that is always zero costs nothing; time first or last makes no difference."""
    model = made(batch_first=batch_first)
    with torch.no_grad():
        for parameter in (model.words.weight, model.words.bias):
            parameter[[2, 7]] = 0
    before = model(X)
    report = prune(model, X, LOADER, budget=Budget(params=0.9), method=method, refit=None).report
    assert [(row.name, row.before, row.after) for row in report.rows] == [("words", 12, 10)]
    if method not in ("psap", "itpruner"):  # PSAP looks at the weights, ITPruner at correlations of whole layers
        assert torch.allclose(model(X), before, atol=1e-6)


def test_a_recurrent_layer_is_not_refitted_and_says_so():
    report = prune(made(batch_first=True), X, LOADER, budget=Budget(params=0.9), method="obs")
    assert "reads: it is a recurrent layer" in str(report)


def test_what_its_input_adds_to_the_gates():
    model = made(nn.GRU, **DEEP)
    x = torch.randn(2, 3, 12)
    u = unfolded_input(model.reads, x, model.reads(x)[0], None, torch.Generator())
    weight = consumer_weight(model.reads)
    assert u.shape == (2, 3, 1, 12) and weight.shape == (1, 30, 12) and feature_channels(model.reads).shape == (1, 12)
    expected = torch.cat([model.reads.weight_ih_l0, model.reads.weight_ih_l0_reverse]) @ x[0, 1]
    assert torch.allclose(weight[0] @ u[0, 1, 0], expected, atol=1e-6)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_torch_prunings_own_pruner(kind):
    model = made(kind, batch_first=True)
    with label_groups():
        pruner = tp.pruner.BasePruner(model, X, tp.importance.MagnitudeImportance(), pruning_ratio=0.5)
    pruner.step()
    assert model.words.out_features == model.reads.input_size == 6 and model(X).shape == (2, 4)
