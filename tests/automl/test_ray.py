"""The Ray Tune adapter inside Ray: two local workers, no dashboard, shut down in the end."""

import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from helpers.paths import ROOT
from tp_importance import Budget, count_ops, prunable_groups
from tp_importance.automl import prune_trial, ray_trainable, search_space

pytestmark = pytest.mark.slow


@pytest.fixture
def tune(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray", reason="Ray is not installed (extra automl)")
    tune = pytest.importorskip("ray.tune", reason="Ray Tune is not installed (extra automl)")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # 15 by default: on a busy machine they never come to an end
    try:
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            object_store_memory=100 * 2**20,
        )
        yield tune
    finally:
        ray.shutdown()


def test_two_workers_prune_and_one_failing_trial_stops_nobody(tune, tmp_path):
    from ray.tune.search import BasicVariantGenerator

    torch.manual_seed(0)
    conv = [nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()]
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), *conv, nn.Conv2d(8, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    model.eval()
    x = torch.randn(2, 3, 12, 12)
    loader = [(torch.randn(16, 3, 12, 12), torch.arange(16) % 4)]
    dense = count_ops(model, x)[0]
    space = search_space(prunable_groups(model, x), methods=["catro", "magnitude"], options=False, per_group="ratio")
    statistics = str(tmp_path / "statistics")

    def run(params):
        start = time.time()
        found = prune_trial(
            model,
            params,
            example_inputs=x,
            loader=loader,
            budget=Budget(macs=0.5),
            evaluate=lambda net: float(sum(p.detach().abs().sum() for p in net.parameters())),
            statistics=statistics,
            latency_seconds=None,
        )
        time.sleep(1)
        if params["ratio:0"] < 0.2:
            raise RuntimeError(f"no luck with {params}")
        return {**found, "start": start, "end": time.time()}

    points = [
        {"method": method, "ratio:0": ratio, "ratio:2": 0.5}
        for method, ratio in (("catro", 0.5), ("catro", 0.4), ("magnitude", 0.5), ("magnitude", 0.1))
    ]
    param_space = space.to_ray()
    drawn = {name: domain.sample() for name, domain in param_space.items()}
    assert space.check(drawn) == drawn
    search = BasicVariantGenerator(points_to_evaluate=points, max_concurrent=2)
    tuner = tune.Tuner(
        ray_trainable(space, run),
        param_space=param_space,
        tune_config=tune.TuneConfig(metric="default", mode="max", num_samples=4, search_alg=search, reuse_actors=True),
        run_config=tune.RunConfig(storage_path=str(tmp_path / "ray"), verbose=0),
    )
    results = tuner.fit()
    assert len(results) == 4 and results.num_errors == 1
    assert "no luck with" in str(results.errors[0]) and "'ratio:0': 0.1" in str(results.errors[0])
    good = [result for result in results if not result.error]
    for result in good:
        assert 0 < result.metrics["macs"] <= 0.5 * dense
        found = prune_trial(
            model,
            result.config,
            example_inputs=x,
            loader=loader,
            budget=Budget(macs=0.5),
            evaluate=lambda net: float(sum(p.detach().abs().sum() for p in net.parameters())),
            latency_seconds=None,
        )
        assert found["default"] == pytest.approx(result.metrics["default"], rel=1e-5)
    assert results.get_best_result().metrics["default"] == max(r.metrics["default"] for r in good)
    spans = sorted((r.metrics["start"], r.metrics["end"]) for r in good)
    assert any(later[0] < earlier[1] for earlier, later in pairwise(spans))  # two at a time
    assert len(list(Path(statistics).glob("*.npz"))) == 2  # one per method, shared by the workers
