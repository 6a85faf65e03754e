"""A clock that reads the shapes, and the small networks timed by it."""

import math
from functools import cache, partial

import torch
import torch_pruning as tp
from torch import nn

from tp_importance import Budget, LatencyTable
from tp_importance.core.guards import preserved
from tp_importance.latency.measure import Latency
from tp_importance.latency.model import LatencyModel
from tp_importance.testing import topology

L2 = partial(tp.importance.MagnitudeImportance, p=2)
HALF = Budget(latency=0.5)


class Clock:
    """Milliseconds from shapes: layers with weights have stairs of `step` outputs; a network has overhead."""

    def __init__(self, step=1, overhead=0.25, scale=1.5):
        self.step, self.overhead, self.scale, self.calls = step, overhead, scale, 0

    def __call__(self, model, x, *, forward_fn=None, min_run_time=0.5):
        self.calls += 1
        total, handles = [], []
        leaves = [m for m in model.modules() if not list(m.children())]
        for module in leaves:
            handles.append(module.register_forward_hook(lambda m, args, out: total.append(self.layer(m, args[0], out))))
        with preserved(model), torch.no_grad():
            model.eval()
            (forward_fn or (lambda m, v: m(*v) if isinstance(v, tuple) else m(v)))(model, x)
        for handle in handles:
            handle.remove()
        alone = len(leaves) == 1 and leaves[0] is model
        ms = sum(total) if alone else self.overhead + self.scale * sum(total)
        return Latency(ms, 0.125, 1, 1, "fake", 1)

    def layer(self, module, x, out):
        if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
            weight = module.weight
            transposed = getattr(module, "transposed", False)
            outputs = weight.shape[1] if transposed else weight.shape[0]
            inputs = weight.numel() // outputs
            places = 1 if isinstance(module, nn.Linear) else out.shape[-1]
            return 1e-5 * inputs * math.ceil(outputs / self.step) * self.step * places
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            return 1e-6 * out.numel()
        return 0.0


@cache
def timed(name, step=1):
    case = topology(name)
    table = LatencyTable(measure=Clock(step))
    return LatencyModel.measure(case.groups, case.x, table)
