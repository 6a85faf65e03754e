"""NNI's tracer, repaired, where torch.fx cannot trace; NNI that is missing."""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

nni = pytest.importorskip("nni")

from nni.compression.pruning import L1NormPruner  # noqa: E402

from helpers.nni_speedup_cases import Masks, config_list, masked_output, masks_of  # noqa: E402
from nni_plugins._compat import NNIUnavailableError, import_nni  # noqa: E402
from nni_plugins.surgery.speedup import speedup  # noqa: E402
from nni_plugins.surgery.tracer import legacy_tracer_shim  # noqa: E402
from tp_importance.testing import Snapshot, make_network  # noqa: E402
from tp_importance.testing.networks import randomise_batchnorm  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore:.torch.jit:FutureWarning"
)  # NNI's search for dependencies traces with it


class Branching(nn.Module):
    """Control flow on tensors, which torch.fx refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12)
        self.layers = nn.ModuleList(nn.Conv2d(12, 12, 1) for _ in range(2))
        self.fc = nn.Linear(12, 4)

    def forward(self, x: Tensor, mask: Tensor | None = None, shift: bool = False) -> Tensor:
        if x.abs().sum() > 0:
            x = F.relu(self.bn(self.conv(x)))
        if shift:
            x = torch.cat([x[..., 1:], x[..., :1]], dim=-1)
        for layer in self.layers:
            if not x.mean() > 1e9 and x.dim() == 4:
                x = x + layer(x)
        while x.abs().max() > 1e9:
            x = x / 2
        n, c, *_ = x.shape
        return self.fc(x.mean(dim=(2, 3)).reshape(n, c))


def branching() -> tuple[nn.Module, Tensor, Masks]:
    model, x = Branching(), torch.randn(2, 3, 8, 8)
    randomise_batchnorm(model, x)
    return model, x, masks_of(model, {n: [0, 3] for n in ("conv", "bn", "layers.0", "layers.1")})


def test_control_flow_needs_the_shim():
    model, x, masks = branching()
    before, expected = Snapshot(model), masked_output(model, masks, x)
    with pytest.raises(RuntimeError, match=r"cannot trace Branching.*control flow.*try compat_shim=True"):
        speedup(model, x, masks, engine="nni")
    before.check()
    speedup(model, {"shift": True, "x": x}, masks, engine="nni", compat_shim=True)
    torch.testing.assert_close(model(x), expected, atol=1e-6, rtol=1e-5)
    assert model.fc.in_features == model.layers[1].in_channels == 10


@pytest.mark.parametrize("name", ["residual", "se"])
def test_both_tracers_agree(name):
    (model, x), (twin, _) = make_network(name), make_network(name)
    pruner = L1NormPruner(model, config_list(model, x, 0.25))
    _, masks = pruner.compress()
    pruner.unwrap_model()
    assert torch.equal(
        speedup(model, x, masks, engine="nni")(x), speedup(twin, x, masks, engine="nni", compat_shim=True)(x)
    )


@pytest.mark.parametrize("fails", [False, True])
def test_the_shim_restores_everything(fails):
    tracer = import_nni("nni.common.concrete_trace_utils.concrete_tracer")
    proxy = import_nni("nni.common.concrete_trace_utils.concrete_proxy")
    owners = [
        torch.Tensor,
        nn.Module,
        torch.autograd.Function,
        tracer,
        tracer.ConcreteTracer,
        proxy,
        proxy.ConcreteProxy,
    ]
    before = [dict(vars(owner)) for owner in owners]
    model, x, _ = branching()
    if fails:
        with pytest.raises(ZeroDivisionError), legacy_tracer_shim():
            _ = 1 / 0
    else:
        with legacy_tracer_shim():
            assert tracer.concrete_trace(model, (x,))(x).shape == (2, 4)
            assert vars(torch.Tensor).keys() != before[0].keys()
    for owner, saved in zip(owners, before, strict=True):
        now = dict(vars(owner))
        assert now.keys() == saved.keys() and all(now[k] is saved[k] for k in saved), owner


def test_the_shim_refuses_other_versions(monkeypatch):
    monkeypatch.setattr(nni, "__version__", "3.1")
    with pytest.raises(
        RuntimeError, match=rf"NNI 3.0 only, found NNI 3.1 \(torch {torch.__version__[:3]}.*compat_shim"
    ):
        with legacy_tracer_shim():
            pass


def test_a_failing_import_names_reason_and_extra(monkeypatch):
    def broken(name: str) -> None:
        raise AttributeError("module 'torchvision' has no attribute 'extension'")

    monkeypatch.setattr("nni_plugins._compat.importlib", SimpleNamespace(import_module=broken))
    with pytest.raises(NNIUnavailableError, match=r"torchvision.*pip install \"tp-importance\[nni\]\"") as caught:
        import_nni("nni.compression.speedup")
    assert isinstance(caught.value, ImportError) and isinstance(caught.value, RuntimeError)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "nni.compression.speedup", None)  # as if it were not installed
    model, x = make_network("plain")
    before = Snapshot(model)
    with pytest.raises(NNIUnavailableError, match=r"cannot import 'nni\.compression\.speedup'"):
        speedup(model, x, masks_of(model, {"0.0": [1, 2], "0.1": [1, 2]}), engine="nni")
    before.check()
