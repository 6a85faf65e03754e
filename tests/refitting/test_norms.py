"""Refits of transformers and of networks with group norms: streams, heads and MLPs."""

import copy

import pytest
import torch

from helpers.norm_networks import norm_network
from tp_importance import Budget, Refit, count_ops, prune
from tp_importance.graph.surgery import remove_units
from tp_importance.refitting.refit import refit_consumers

NETWORKS = ["prenorm", "postnorm", "rms", "groupnorm", "response"]


def data(count=3):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(32, 3, 8, 8, generator=generator), torch.arange(32) % 3) for _ in range(count)]


def outputs(model):
    with torch.no_grad():
        return model.eval()(torch.cat([x for x, _ in data()]).to(next(model.parameters())))


def removal(groups):
    return {g.name: list(range(max(g.n_units // 3, 1))) for g in groups if g.n_units > 1}


@pytest.mark.parametrize("name", NETWORKS)
def test_all_readers_of_streams_heads_and_mlps_are_refitted(name):
    """In one pass or one layer after the other, to what the pruned network gives them."""
    errors, weights = {}, []
    for memory in (None, 2**30, 1):
        model, _, groups = norm_network(name, double=True)
        dense, removed = outputs(model), removal(groups)
        if memory is not None:
            loader = [(x.double(), y) for x, y in data()]
            settings = Refit("sequential", positions=None, memory_limit=memory)
            report = refit_consumers(model, groups.trace.example_inputs, loader, removed, settings, groups=groups)
            assert report.passes == 2 if memory > 1 else report.passes > 2
            assert {r.name for r in report.rows} >= {m.name for g in groups for m in g.consumers}
            assert all(not r.skipped and r.after <= r.before for r in report.rows)
            weights.append(copy.deepcopy(model.state_dict()))
        remove_units(groups, removed)
        errors[memory] = float((outputs(model) - dense).square().mean())
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=1e-6, atol=1e-8)
    assert errors[2**30] < 0.5 * errors[None]


@pytest.mark.parametrize("mode", ["sequential", "parallel"])
def test_the_last_row_is_the_error_of_the_pruned_network(mode):
    """The report of the head, which reads the stream behind a norm, is what the network then does."""
    model, _, groups = norm_network("prenorm", double=True)
    dense, removed = outputs(model), removal(groups)
    loader = [(x.double(), y) for x, y in data()]
    report = refit_consumers(
        model, groups.trace.example_inputs, loader, removed, Refit(mode, positions=None), groups=groups
    )
    remove_units(groups, removed)
    spread = (dense - dense.mean(0)).square().sum()
    found = float((outputs(model) - dense).square().sum() / spread)
    row = next(r for r in report.rows if r.name == "head")
    if mode == "sequential":
        assert found == pytest.approx(row.after, rel=1e-4)
    else:  # as if the other layers were dense
        assert row.after < found


@pytest.mark.parametrize("refit", ["sequential", "parallel", None])
@pytest.mark.parametrize("method", ["obs", "catro", "itpruner", "psap", "l2", "taylor"])
def test_one_call(method, refit):
    model, x, _ = norm_network("prenorm")
    before = count_ops(model, x)[0]
    prune(model, x, data(), budget=Budget(macs=0.5), method=method, refit=refit)
    assert 0.4 * before < count_ops(model, x)[0] <= 0.5 * before
    assert torch.isfinite(outputs(model)).all()
