"""Values of networks, to be compared later; where flags and hooks matter, too: ``tp_importance.testing.Snapshot``."""

import torch

from tp_importance.testing import same_tensors


def state(model):
    """A copy of all parameters and buffers."""
    return {k: v.clone() for k, v in model.state_dict().items()}


def same_state(model, before):
    return same_tensors(model.state_dict(), before)


def weights(model):
    """All parameters in one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])
