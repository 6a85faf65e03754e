import sys
import zipfile
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from tp_importance import Budget, PSAPPruner, PSAPSchedule, count_ops
from tp_importance.budget import Cost
from tp_importance.methods.psap.integrations import huggingface_callback, lightning_callback
from tp_importance.testing import loader_for, make_network, same_values

SCHEDULE = PSAPSchedule(prune_steps=2, begin=0.2, end=0.6, pulse=2)
TOTAL = 12


def fake(monkeypatch, module, name):
    """A package with nothing but the base class of its callbacks."""
    package = ModuleType(module)
    base = type(name, (), {"from_the_package": True})
    setattr(package, name, base)
    for part in range(module.count(".") + 1):
        monkeypatch.setitem(sys.modules, ".".join(module.split(".")[: part + 1]), package)
    return base


class FakeLightning:
    """The order in which Lightning calls things: accumulation, global_step, optimizers behind a wrapper."""

    def __init__(self, model, loader, callback, accumulate=1, steps=TOTAL, stop_at=None):
        self.model, self.loader, self.callback, self.accumulate = model, loader, callback, accumulate
        self.optimizers = [torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)]
        self.estimated_stepping_batches, self.global_step, self.stop_at = steps, 0, stop_at or steps

    def fit(self, at=0):
        self.global_step, (optimizer,) = at, self.optimizers
        self.callback.on_train_start(self, self.model)
        self.model.train()
        batch = at * self.accumulate
        while self.global_step < self.stop_at:
            x, y = self.loader[batch % len(self.loader)]
            nn.functional.cross_entropy(self.model(x), y).backward()
            batch += 1
            if batch % self.accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
                self.global_step += 1
            self.callback.on_train_batch_end(self, self.model, None, (x, y), batch - 1)


def network():
    model, x = make_network("residual")
    return model, x, PSAPPruner(model, x, budget=Budget(macs=0.5), schedule=SCHEDULE)


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("finish", ["end", "frozen"])
def test_lightning(monkeypatch, package, accumulate, finish):
    if package == "pytorch_lightning":
        monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    base = fake(monkeypatch, package, "Callback")
    model, x, pruner = network()
    callback = lightning_callback(pruner, finish=finish)
    assert isinstance(callback, base) and callback.from_the_package
    trainer = FakeLightning(model, loader_for(x), callback, accumulate)
    trainer.fit()
    assert [s.iteration for s in pruner.history] == [2, 7]
    assert (callback.report is not None) == (finish == "frozen")
    callback.on_train_end(trainer, model)
    assert callback.report.cost == Cost(*count_ops(model, x)) and callback.report.cost.macs <= 0.5 * pruner.dense.macs
    assert all(any(p is q for q in model.parameters()) for p in trainer.optimizers[0].param_groups[0]["params"])
    assert callback.state_dict() == {}
    with pytest.raises(ValueError, match="load_pruned"):
        callback.load_state_dict({})


def test_lightning_checkpoints(monkeypatch):
    fake(monkeypatch, "lightning.pytorch", "Callback")
    model, x, pruner = network()
    callback = lightning_callback(pruner)
    FakeLightning(model, loader_for(x), callback).fit()

    first, x, other = network()
    trainer = FakeLightning(first, loader_for(x), lightning_callback(other), stop_at=4)
    trainer.fit()
    state, weights, moments = trainer.callback.state_dict(), first.state_dict(), trainer.optimizers[0].state_dict()

    again, x, third = network()
    again.load_state_dict(weights)
    resumed = lightning_callback(third)
    resumed.load_state_dict(state)
    trainer = FakeLightning(again, loader_for(x), resumed)
    trainer.optimizers[0].load_state_dict(moments)
    trainer.fit(at=4)
    assert same_values(model, again) and pruner.masked == third.masked


def test_trainings_that_end_early_or_never(monkeypatch):
    fake(monkeypatch, "lightning.pytorch", "Callback")
    model, x, pruner = network()
    trainer = FakeLightning(model, loader_for(x), lightning_callback(pruner), stop_at=5)
    trainer.fit()
    with pytest.warns(UserWarning, match="ended early .prune step 1 of 2, after 5 of 12"):
        trainer.callback.on_train_end(trainer, model)
    assert Cost(*count_ops(model, x)).macs <= 0.5 * pruner.dense.macs
    model, x, pruner = network()
    trainer = FakeLightning(model, loader_for(x), lightning_callback(pruner), steps=float("inf"), stop_at=5)
    with pytest.raises((ValueError, OverflowError), match="max_epochs"):
        trainer.fit()


class Accelerated(torch.optim.Optimizer):
    """As Accelerate wraps optimizers."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    state = property(lambda self: self.optimizer.state)
    param_groups = property(lambda self: self.optimizer.param_groups)


def hugging(model, x, callback, folder, start=0, stop=TOTAL, moments=None):
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    if moments is not None:
        optimizer.load_state_dict(moments)
    args = SimpleNamespace(output_dir=str(folder))
    state, control = SimpleNamespace(max_steps=TOTAL, global_step=start), None
    loader = loader_for(x)
    callback.on_train_begin(args, state, control, model=model, optimizer=Accelerated(optimizer))
    model.train()
    for i in range(start, stop):
        a, y = loader[i % len(loader)]
        nn.functional.cross_entropy(model(a), y).backward()
        optimizer.step()
        model.zero_grad()  # before on_step_end, as transformers does
        state.global_step += 1
        callback.on_step_end(args, state, control, model=model)
        if state.global_step % 4 == 0:
            callback.on_save(args, state, control)
    return optimizer, (args, state, control)


@pytest.mark.parametrize("finish", ["end", "frozen"])
def test_hugging_face(monkeypatch, tmp_path, finish):
    base = fake(monkeypatch, "transformers", "TrainerCallback")
    model, x, pruner = network()
    callback = huggingface_callback(pruner, finish=finish)
    assert isinstance(callback, base)
    optimizer, rest = hugging(model, x, callback, tmp_path)
    callback.on_train_end(*rest)
    assert callback.report.cost == Cost(*count_ops(model, x)) and callback.report.cost.macs <= 0.5 * pruner.dense.macs
    assert all(state["exp_avg"].shape == p.shape for p, state in optimizer.state.items())
    assert (tmp_path / "checkpoint-4" / "psap.pt").exists()


def test_hugging_face_resumes(monkeypatch, tmp_path):
    fake(monkeypatch, "transformers", "TrainerCallback")
    model, x, pruner = network()
    hugging(model, x, huggingface_callback(pruner), tmp_path / "a")
    first, x, other = network()
    optimizer, _ = hugging(first, x, huggingface_callback(other), tmp_path / "b", stop=4)
    again, x, third = network()
    again.load_state_dict(first.state_dict())
    callback = huggingface_callback(third, resume_from=tmp_path / "b" / "checkpoint-4")
    hugging(again, x, callback, tmp_path / "c", start=4, moments=optimizer.state_dict())
    assert same_values(model, again) and pruner.masked == third.masked
    with pytest.raises(ValueError, match=r"psap.pt is missing"):
        huggingface_callback(network()[2], resume_from=tmp_path)
    state = tmp_path / "b" / "checkpoint-4" / "psap.pt"
    assert [entry.name for entry in state.parent.iterdir()] == ["psap.pt"]
    whole = state.read_bytes()
    with zipfile.ZipFile(state) as archive:
        at = max(member.header_offset for member in archive.infolist() if "/data/" in member.filename) + 200
    for damaged in (whole[: len(whole) // 2], b"", whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]):
        state.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"psap.pt cannot be read .*may be damaged: resume from another"):
            huggingface_callback(network()[2], resume_from=state.parent)


@pytest.mark.parametrize("make", [lightning_callback, huggingface_callback])
def test_bad_input(monkeypatch, make):
    fake(monkeypatch, "lightning.pytorch", "Callback")
    fake(monkeypatch, "transformers", "TrainerCallback")
    with pytest.raises(TypeError, match="PSAPPruner"):
        make(3)
    with pytest.raises(ValueError, match="finish="):
        make(network()[2], finish="soon")


WANTED = [(lightning_callback, ["lightning.pytorch", "pytorch_lightning"]), (huggingface_callback, ["transformers"])]


@pytest.mark.parametrize("make, packages", WANTED)
def test_without_the_package(monkeypatch, make, packages):
    for package in packages:
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(RuntimeError, match=r"needs .*; pip install"):
        make(network()[2])


REAL = [
    ("lightning.pytorch", "Callback", lightning_callback),
    ("transformers", "TrainerCallback", huggingface_callback),
]


@pytest.mark.parametrize("package, name, make", REAL)
def test_with_the_real_package(package, name, make):
    base = getattr(pytest.importorskip(package), name)
    assert isinstance(make(network()[2]), base)
