"""NNI masks parameters: layers whose weight is computed keep their outputs, and lose inputs where that is exact."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, weight_norm

pytest.importorskip("nni")

from nni_plugins import CATROPruner, speedup
from nni_plugins.testing import output, relative_error
from tp_importance.testing import class_loader
from tp_importance.testing.networks import conv_bn_relu, head

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))
CONFIG = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]


def network(change):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(*(conv_bn_relu(a, b) for a, b in ((3, 8), (8, 12), (12, 10), (10, 8))), head(8))
        change(model[1][0])
    return model.eval()


def test_groups_at_a_computed_weight_are_left_out():
    model = network(parametrizations.weight_norm)

    with pytest.warns(UserWarning, match=r"left alone, though selected: .*1\.0\.weight is computed"):
        pruner = CATROPruner(model, CONFIG, loader=class_loader(32))
    assert pruner.left_out.keys() == {"0.0"}
    _, masks = pruner.compress()
    pruner.unwrap_model()
    speedup(model, X, masks)
    assert [model[i][0].out_channels for i in range(4)] == [8, 12, 5, 4]
    assert model(X).shape == (2, 4)


class Softsign(nn.Module):
    """Acts on every weight by itself, so that inputs can go, too."""

    def forward(self, weight):
        return weight / (1 + weight.abs())


def test_a_computed_weight_may_read_masked_channels():
    model = network(lambda layer: parametrize.register_parametrization(layer, "weight", Softsign()))
    pruner = CATROPruner(model, CONFIG, loader=class_loader(32))
    assert not pruner.left_out
    _, masks = pruner.compress()
    masked = output(model, X)
    pruner.unwrap_model()
    speedup(model, X, masks)
    assert [model[i][0].out_channels for i in range(4)] == [4, 12, 5, 4]
    assert relative_error(masked, output(model, X)) <= 1e-5
    assert model[1][0].parametrizations.weight.original.shape == (12, 4, 3, 3)


def test_speedup_names_what_it_cannot_read():
    model = network(weight_norm)
    with pytest.warns(UserWarning, match="left alone, though selected"):
        pruner = CATROPruner(model, CONFIG, loader=class_loader(32))
    assert pruner.left_out.keys() == {"0.0", "1.0"}
    _, masks = pruner.compress()
    pruner.unwrap_model()
    with pytest.raises(RuntimeError, match=r"NNI knows parameters only: 1\.0\.weight .*remove_weight_norm\(model"):
        speedup(model, X, masks, engine="nni")
    speedup(model, X, masks)  # by our own surgery, which leaves such a layer alone
    assert [model[i][0].out_channels for i in range(4)] == [8, 12, 5, 4]
    assert model(X).shape == (2, 4)
