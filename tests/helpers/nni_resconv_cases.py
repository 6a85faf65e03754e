"""A small network and ResConv's NNI pruner of it, for tests."""

import pytest
import torch
from torch import nn

nni = pytest.importorskip("nni")

from nni.compression import TorchEvaluator  # noqa: E402
from nni.compression.utils.counter import count_flops_params  # noqa: E402

from nni_plugins import ResConvPruner, speedup  # noqa: E402
from nni_plugins.testing import TrainingLog, hooks, make_evaluator, output, relative_error, training_step, wrappers  # noqa: E402
from tp_importance import Budget, count_ops  # noqa: E402
from tp_importance.budget import Cost  # noqa: E402
from tp_importance.methods.resconv import resconv_layers  # noqa: E402
from tp_importance.testing import class_loader  # noqa: E402
from tp_importance.testing.networks import Residual, conv_bn_relu, head, randomise_batchnorm  # noqa: E402

CONVS = [{"op_types": ["Conv2d"]}]
LAYERS = ["1.0", "2.0", "3.body.0.0", "3.body.1.0", "4.body.1.0"]
LOADER = class_loader(shape=(3, 10, 10))
HALF = Budget(macs=0.6)
MARKS = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:layer .* has a=0"),  # training may put it there
    pytest.mark.filterwarnings("ignore:.*step.* has been overridden"),  # by NNI, on purpose
]


def network(seed=0):
    """A chain and two residual blocks: 5 of 8 convolutions can hold a shortcut."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        blocks = [Residual(8, 8, 8), Residual(8, 12, 12, stride=2)]
        model = nn.Sequential(conv_bn_relu(3, 8), conv_bn_relu(8, 8), conv_bn_relu(8, 8), *blocks, head(12))
    x = torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(seed))
    randomise_batchnorm(model, x, seed)
    return model.eval(), x


def evaluator_of(model, log=None, step=training_step, **options):
    """The contract's evaluator, or one with another training step or optimizer."""
    if not options and step is training_step:
        return make_evaluator(model, LOADER, log or TrainingLog())
    optimizer = nni.trace(torch.optim.SGD)(options.pop("params", None) or model.parameters(), lr=0.05, **options)
    return TorchEvaluator(make_evaluator(model, LOADER, log or TrainingLog()).training_func, optimizer, step)


def pruner_of(config_list=CONVS, *, train=False, budget=HALF, **options):
    model, x = network()
    evaluator = evaluator_of(model) if train else None
    return ResConvPruner(model, config_list, evaluator, budget=budget, example_inputs=x, a=0.5, **options), x


def scale(pruner, name):
    return pruner._module_wrappers[name].s


def assert_sped_up(pruner, masks, x, plan=None):
    """The masked model, sped up, computes the same, costs what was planned and is plain."""
    model, plan = pruner.bound_model.eval(), plan or pruner.plan
    masked = output(model, x)
    pruner.unwrap_model()
    assert speedup(model, x, masks) is model
    assert relative_error(masked, output(model, x)) <= 1e-5
    assert not resconv_layers(model) and not wrappers(model) and not hooks(model)
    assert Cost(*count_ops(model, x)) == plan.cost
    assert all(getattr(plan.cost, f) <= limit for f, limit in plan.limits.items())
    assert count_flops_params(model, x, verbose=False)[0] == plan.cost.macs
