"""The ONNX file gives what the network gives, for any number of samples, or there is no file."""

import importlib
import sys

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

import onnxruntime

from helpers.states import same_state, state
from tp_importance import Budget, PSAPPruner, PSAPSchedule, ResConvPruner, export_onnx, prune
from tp_importance.errors import MissingPackageError
from tp_importance.testing import class_loader, make_network

HALF = Budget(macs=0.5)


def run(path, *inputs):
    session = onnxruntime.InferenceSession(path.read_bytes())
    names = [i.name for i in session.get_inputs()]
    return session.run(None, dict(zip(names, [x.numpy() for x in inputs], strict=True)))


def by_psap(model, x):
    pruner = PSAPPruner(model, x, budget=HALF, schedule=PSAPSchedule(prune_steps=2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model.train()
    pruner.start(optimizer, total_steps=4)
    for _ in range(4):
        model(x).square().mean().backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
    pruner.finish()


def by_resconv(fuse):
    def prune_layers(model, x):
        budget = Budget(macs=0.9)
        ResConvPruner(model, x, class_loader(32), budget=budget, importance="output").step(fuse=fuse, refit=True)

    return prune_layers


@pytest.mark.parametrize(
    "how",
    [
        lambda model, x: prune(model, x, class_loader(32), budget=HALF, method="catro"),
        lambda model, x: prune(model, x, class_loader(32), budget=HALF, method="obs"),
        lambda model, x: prune(model, x, class_loader(32), budget=HALF, method="itpruner", refit="parallel"),
        by_psap,
        by_resconv(True),
        by_resconv(False),
    ],
    ids=["catro", "obs", "itpruner", "psap", "resconv", "resconv, unfused"],
)
def test_networks_of_every_method(how, tmp_path):
    model, x = make_network("residual")
    model.insert(1, nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()))  # for ResConv
    how(model.eval(), x)
    model.train()
    model[0].eval()
    modes, before = [m.training for m in model.modules()], state(model)
    export_onnx(model, x, tmp_path / "net.onnx")
    assert [m.training for m in model.modules()] == modes and same_state(model, before)
    more = torch.cat([x, x, x[:1]])
    with torch.no_grad():
        wanted = model.eval()(more)
    np.testing.assert_allclose(run(tmp_path / "net.onnx", more)[0], wanted.numpy(), rtol=1e-3, atol=1e-4)


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)

    def forward(self, ids, mask=None):
        x = self.embedding(ids) * mask.unsqueeze(2)
        return {"logits": self.head(x.sum(1)), "states": [x]}


def test_inputs_by_name_and_several_outputs(tmp_path):
    torch.manual_seed(0)
    model, ids, mask = Words(), torch.randint(9, (3, 5)), torch.ones(3, 5)
    export_onnx(model, {"ids": ids, "mask": mask}, tmp_path / "words.onnx")
    logits, states = run(tmp_path / "words.onnx", ids[:1], mask[:1])
    assert logits.shape == (1, 3) and states.shape == (1, 5, 4)


class Fixed(nn.Module):
    def forward(self, x):
        return x.reshape(2, -1)


class Asking(nn.Module):
    def forward(self, x):
        return x + 1 if len(x) < 3 else x - 1


class Noisy(nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x)


def test_what_goes_wrong_leaves_the_old_file(tmp_path):
    path, x = tmp_path / "net.onnx", torch.randn(2, 3)
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError) as caught:
        export_onnx(Fixed(), x, path)
    assert "raised by the Fixed on 3 samples; if it takes one number, dynamic_batch=False" in caught.value.__notes__[-1]
    with pytest.raises(RuntimeError, match=r"(?s)cannot run the file on 3 samples: .*give dynamic_batch=False"):
        export_onnx(Asking(), x, path)
    with pytest.raises(RuntimeError, match=r"output 0 of the file .* in onnxruntime, on 2 samples"):
        export_onnx(Noisy(), x, path)
    with pytest.raises(ValueError, match="a dynamic batch is recognised from two on"):
        export_onnx(Noisy(), x[:1], path)
    with pytest.raises(TypeError, match="compile"):
        export_onnx(torch.compile(Noisy()), x, path)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["net.onnx"]
    export_onnx(Fixed(), x, path, dynamic_batch=False)
    np.testing.assert_array_equal(run(path, x)[0], x.numpy())


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingPackageError, match=r"onnxruntime is needed .*tp-importance\[onnx\]"):
        export_onnx(nn.Linear(2, 2), torch.randn(2, 2), tmp_path / "x")
    assert importlib.import_module("tp_importance")
