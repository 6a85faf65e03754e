"""Refitted networks, for tests."""

import copy

import torch
import torch_pruning as tp

from tp_importance import Refit, prunable_groups
from tp_importance.graph.patches import unfolded_input
from tp_importance.graph.verify import sample_units
from tp_importance.refitting.refit import refit_consumers
from tp_importance.testing import make_network

L1 = tp.importance.MagnitudeImportance(p=1, normalizer=None)
EXACT = Refit("parallel", ridge=0.0, positions=None, recalibrate=False)
MODES = ["parallel", "sequential"]


def images(n=16, size=10, seed=0, dtype=torch.float32):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs_of(model, name, x):
    """What a layer receives, unfolded at all positions, and what it gives."""
    module, seen = model.get_submodule(name), []
    handle = module.register_forward_hook(lambda m, args, out: seen.append((args[0].detach(), out.detach())))
    with torch.no_grad():
        model(x)
    handle.remove()
    rows = [unfolded_input(module, a, b, None, torch.Generator()).flatten(0, 1) for a, b in seen]
    return torch.cat(rows)


def refitted(name, how=EXACT, dtype=torch.float64):
    """A topology before and after, its groups, what was removed, data and the report."""
    model, x = make_network(name)
    model, x = model.to(dtype), x.to(dtype)
    groups = prunable_groups(model, x, verify=False)  # none of those below is refused; it takes seconds
    removed = sample_units(groups)
    shape = x.shape[1:]
    data = torch.randn(16, *shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    dense = copy.deepcopy(model)
    report = refit_consumers(model, x, data.split(6), removed, how, groups=groups)
    return dense, model, groups, removed, data, report


def duplicated(name):
    """A network of which one group's second half of channels is twice its first half; and that group."""
    model, x = make_network(name)
    model, x = model.double(), x.double()
    groups = prunable_groups(model, x)
    group = next(g for g in groups if len(g.producers) == 1 and g.unit_size == 1)
    half = group.n_units // 2
    with torch.no_grad():
        for m in group.members:
            if m.role != "out" and m.kind != "passthrough":
                continue
            module = model.get_submodule(m.name)
            if m.kind == "consumer":
                continue
            for tensor in [*module.parameters(), *module.buffers()]:
                if tensor.dim():
                    tensor[half : 2 * half] = tensor[:half]
    return model, x, groups, group.name, list(range(half, 2 * half))
