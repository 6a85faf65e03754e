import copy

import pytest
import torch

pytest.importorskip("nni")

from nni.compression.pruning import L1NormPruner

from nni_plugins import ITPruner, speedup
from nni_plugins.testing import NNIPrunerContract, case
from tp_importance import Budget, count_ops
from tp_importance.budget import Cost


class TestITPruner(NNIPrunerContract):
    pruner_class = ITPruner
    options = {"beta": 1.0, "estimator": "unbiased"}  # noqa: RUF012 - as in the contract


@pytest.mark.parametrize("name", ["residual", "depthwise", "grouped"])
def test_widths_are_those_of_the_program(name):
    """Masked is sped up, the widths are the plan's, and NNI's own pruner gets them from the config_list too."""
    c = case(name)
    model = copy.deepcopy(c.model).eval()
    pruner = ITPruner(model, [{"op_types": ["Conv2d", "Linear"]}], loader=c.loader, budget=Budget(macs=0.5), beta=1.0)
    _, masks = pruner.compress()
    with torch.no_grad():
        masked = model(c.x)
    pruner.unwrap_model()
    small = speedup(model, c.x, masks)
    with torch.no_grad():
        torch.testing.assert_close(small(c.x), masked, rtol=1e-4, atol=1e-4)
    plan = pruner.plan
    assert plan is not None and plan.certificate["kkt_residual"] < 1e-6
    assert Cost(*count_ops(small, c.x)) == plan.cost and plan.cost.macs <= 0.5 * plan.dense.macs
    assert {n: small.get_submodule(n).weight.shape[0] for n in plan.widths} == plan.widths

    theirs = L1NormPruner(copy.deepcopy(c.model), plan.config_list(c.groups))
    _, found = theirs.compress()
    kept = {n: int(m["weight"].flatten(1).amax(1).sum()) for n, m in found.items()}
    assert all(kept.get(n, c.groups[n].width) == width for n, width in plan.widths.items())
