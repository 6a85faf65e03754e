"""Fine-tuning with the dense network as teacher on NNI's side: its own distiller, and ours in its evaluator."""

import copy

import pytest
import torch
import torch.nn.functional as F

nni = pytest.importorskip("nni")

from nni.compression import TorchEvaluator  # noqa: E402
from nni.compression.distillation import DynamicLayerwiseDistiller  # noqa: E402
from nni.compression.pruning import AGPPruner  # noqa: E402

from nni_plugins import CATROPruner, speedup  # noqa: E402
from tp_importance import Budget, Distiller, recalibrate_batchnorm  # noqa: E402
from tp_importance.maths.distillation import distillation_loss  # noqa: E402
from tp_importance.testing import class_loader, make_network  # noqa: E402

CONFIG = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]


def linear(model):
    """Name and module of the classifier."""
    ((name, module),) = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    return name, module


@pytest.fixture
def data():
    model, x = make_network("plain")
    with torch.no_grad():
        linear(model)[1].weight.mul_(20)  # a teacher that is sure of something
    return model, x, class_loader(shape=tuple(x.shape[1:]))


def evaluator(model, loader, training_step, losses, before=lambda model: None):
    def train(model, optimizer, training_step, lr_scheduler=None, max_steps=None, max_epochs=None):
        model.train()
        batches = [batch for _ in range(max_epochs or 100) for batch in loader]
        for batch in batches[:max_steps]:
            before(model)
            optimizer.zero_grad()
            loss = training_step(batch, model)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())

    return TorchEvaluator(train, nni.trace(torch.optim.SGD)(model.parameters(), lr=0.05, momentum=0.9), training_step)


def training_step(batch, model):
    return F.cross_entropy(model(batch[0]), batch[1])


def test_nnis_distiller_trains_a_sped_up_student(data):
    model, x, loader = data
    teacher = copy.deepcopy(model).eval()  # NNI takes it as it is: a teacher in train mode would drift
    _, masks = (pruner := CATROPruner(model, CONFIG, loader=loader, budget=Budget(macs=0.5))).compress()
    pruner.unwrap_model()
    speedup(model, x, masks)
    recalibrate_batchnorm(model, loader)
    student, weights = copy.deepcopy(model), copy.deepcopy(teacher.state_dict())

    config = [{"op_names": [linear(model)[0]], "lambda": 0.9, "apply_method": "kl"}]
    losses: list[float] = []
    distiller = DynamicLayerwiseDistiller(
        model,
        config,
        evaluator(model, loader, training_step, losses),
        teacher,
        lambda batch, teacher: teacher(batch[0]),
        origin_loss_lambda=0.1,
    )
    distiller.compress(max_steps=60, max_epochs=None)
    distiller.unwrap_model()
    distiller.unwrap_teacher_model()

    images, labels = loader[0]
    with torch.no_grad():
        first = distillation_loss(student.train()(images), teacher(images), labels, temperature=2.0, weight=0.9)
    assert losses[0] == pytest.approx(first.item(), rel=1e-5)  # its temperature is fixed at 2
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, weights[name]), name


def test_ours_in_the_evaluator_of_a_scheduled_pruner(data):
    model, x, loader = data
    distiller, losses = Distiller(model), []

    def with_a_teacher(batch, model):
        return distiller(model(batch[0]), *batch)

    pruner = CATROPruner(
        model, CONFIG, evaluator(model, loader, with_a_teacher, losses), loader=loader, budget=Budget(macs=0.5)
    )
    _, masks = AGPPruner(pruner, interval_steps=3, total_times=2).compress(max_steps=30, max_epochs=None)
    assert len(losses) == 30 and losses[-1] < max(losses[6:9])  # learns after the last prune step
    pruner.unwrap_model()
    speedup(model, x, masks)
    labels = loader[0][1]
    assert distiller(model.eval()(loader[0][0]), loader[0][0], labels).isfinite()
    assert not any(m.training for m in distiller.teacher.modules())
