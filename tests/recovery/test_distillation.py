import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import nn

from helpers.states import state
from tp_importance import Budget, BudgetPruner, Distiller, PSAPPruner, slice_classifier
from tp_importance.maths.distillation import distillation_loss, feature_loss

X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 3, 4, 0])


def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(8, 8, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


def prune(model):
    l1 = tp.importance.MagnitudeImportance(p=1)
    BudgetPruner(model, X, importance=l1, budget=Budget(macs=0.5), allocator="uniform").step()
    return model


def test_loss_is_that_of_the_dense_network():
    model = network()
    distiller = Distiller(model, temperature=2.0, weight=0.7)
    dense = copy.deepcopy(model).eval()
    student = prune(model).eval()
    expected = distillation_loss(student(X), dense(X), Y, temperature=2.0, weight=0.7)
    torch.testing.assert_close(distiller(student(X), X, Y), expected)
    assert distiller(student(X), X) == distillation_loss(student(X), dense(X), temperature=2.0)


def test_training_moves_the_student_and_nothing_of_the_teacher():
    student = network()
    distiller = Distiller(student.train())
    before = state(distiller.teacher)
    prune(student).train()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        torch.manual_seed(0)  # dropout
        losses.append(distiller(student(X), X))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    assert not any(m.training for m in distiller.teacher.modules())
    assert not any(p.requires_grad or p.grad is not None for p in distiller.teacher.parameters())
    for name, value in distiller.teacher.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_original_is_left_alone_and_holds_nothing_of_the_teacher():
    model = network().train()
    names = list(model.state_dict())
    distiller = Distiller(model)
    with torch.no_grad():
        distiller(model(X), X, Y)
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert list(model.state_dict()) == names
    assert not {id(p) for p in model.parameters()} & {id(p) for p in distiller.teacher.parameters()}


def test_student_of_some_classes():
    model = network()
    distiller, dense = Distiller(model, classes=[4, 1]), copy.deepcopy(model).eval()
    student = slice_classifier(prune(model), [4, 1]).eval()
    labels = torch.tensor([0, 1, 1, 0, 0, 1])
    expected = distillation_loss(student(X), dense(X)[:, [4, 1]], labels)
    torch.testing.assert_close(distiller(student(X), X, labels), expected)


def test_under_autocast():
    student, distiller = network(), Distiller(network())
    with torch.autocast("cpu", torch.bfloat16):
        output = student(X)
        loss = distiller(output, X, Y)
        assert distiller.logits(X).dtype == torch.bfloat16
    assert output.dtype == torch.bfloat16 and loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad.isfinite().all() and p.dtype == torch.float32 for p in student.parameters())
    assert {p.dtype for p in distiller.teacher.parameters()} == {torch.float32}


def test_layout_of_the_weights_follows_the_images():
    distiller = Distiller(network())
    weight, expected = distiller.teacher[0].weight, distiller.logits(X)
    for layout in (torch.channels_last, torch.contiguous_format):
        logits = distiller.logits(X.contiguous(memory_format=layout))
        torch.testing.assert_close(logits, expected)
        assert weight.is_contiguous(memory_format=layout)


def test_teacher_keeps_its_own_precision():
    distiller, student = Distiller(network()), network().double()
    loss = distiller(student(X.double()), X.double(), Y)
    assert loss.dtype == torch.float64
    assert {p.dtype for p in distiller.teacher.parameters()} == {torch.float32}


def test_follows_the_student_to_its_device():
    student = network()
    distiller = Distiller(student)
    output = student.to("meta")(X.to("meta"))  # a device every machine has
    assert distiller(output, X.to("meta")).device.type == "meta"
    assert {p.device.type for p in distiller.teacher.parameters()} == {"meta"}


class Two(nn.Module):
    """Two inputs, and an output as language models have it."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(2, 4)

    def forward(self, a, b):
        return {"logits": self.a(a) + self.b(b)}


def test_inputs_and_outputs_of_other_forms():
    torch.manual_seed(0)
    model, inputs = Two(), {"a": torch.randn(5, 3), "b": torch.randn(5, 2)}
    distiller = Distiller(model, forward_fn=lambda teacher, batch: teacher(**batch)["logits"])
    student = copy.deepcopy(model)
    with torch.no_grad():
        student.a.weight.zero_()
    expected = distillation_loss(student(**inputs)["logits"], model(**inputs)["logits"])
    assert distiller(student(**inputs)["logits"], inputs) == expected
    with pytest.raises(TypeError, match=r"teacher's output is of type dict.*forward_fn"):
        Distiller(model)(torch.zeros(5, 4), inputs)
    with pytest.raises(TypeError, match=r"student_output is of type dict"):
        distiller(student(**inputs), inputs)


def hooks(model):
    return sum(len(m._forward_hooks) for m in model.modules())


def test_features_add_their_relative_error():
    model = network().eval()
    dense, distiller = copy.deepcopy(model), Distiller(model, features=["4", "6"], feature_weight=3.0)
    with torch.no_grad():
        model[0].weight.mul_(1.1)
    with distiller.watching(model):
        loss = distiller(model(X), X, Y)
    expected = distillation_loss(model(X), dense(X), Y)
    for end in (5, 7):
        expected = expected + 3.0 * feature_loss(model[:end](X), dense[:end](X))
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert model[0].weight.grad.abs().sum() > 0
    assert hooks(model) == hooks(distiller.teacher) == 0


def test_features_are_of_this_batch_or_an_error():
    model, distiller = network(), Distiller(network(), features=["4"])
    with pytest.raises(RuntimeError, match=r"output of '4'.*watching"):
        distiller(model(X), X)
    with distiller.watching(model):
        output = model(X)
        distiller(output, X)
        with pytest.raises(RuntimeError, match="since the last loss"):
            distiller(output, X)
    assert hooks(model) == hooks(distiller.teacher) == 0


def test_features_that_pruning_changed_are_named():
    model = network()
    distiller = Distiller(model, features=["0"])
    prune(model)
    with distiller.watching(model), pytest.raises(ValueError, match=r"feature '0'.*shape.*width pruning kept"):
        distiller(model(X), X)
    assert hooks(model) == hooks(distiller.teacher) == 0
    with pytest.raises(ValueError, match=r"unknown: \['nowhere'\]"):
        Distiller(model, features=["nowhere"])
    with pytest.raises(ValueError, match="must be a list"):
        Distiller(model, features="0")
    with pytest.raises(ValueError, match="feature_weight=-1"):
        Distiller(model, feature_weight=-1)


def test_bad_options_are_refused_at_once():
    with pytest.raises(TypeError, match="teacher is of type list"):
        Distiller([network()])
    with pytest.raises(ValueError, match="temperature=-1"):
        Distiller(network(), temperature=-1)
    with pytest.raises(ValueError, match="weight=2"):
        Distiller(network(), weight=2)
    with pytest.raises(ValueError, match=r"\(6, 5\), student_logits \(6, 2\)"):
        Distiller(network())(torch.zeros(6, 2), X)


def test_weight_zero_trains_as_without_a_teacher():
    student = network().eval()
    output = student(X)
    torch.testing.assert_close(Distiller(student, weight=0.0)(output, X, Y), F.cross_entropy(output, Y))


@pytest.mark.parametrize("features", [[], ["5"]])
def test_a_teacher_made_after_pruning_is_refused(features):
    model = prune(network())
    distiller = Distiller(model, features=features)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):  # not once only
        with distiller.watching(model), pytest.raises(ValueError, match="make the Distiller before pruning"):
            distiller(model.train()(X), X, Y)
    with distiller.watching(model), torch.no_grad():
        assert distiller(model(X), X).isfinite()  # to look at it is no training
    optimizer.step()  # nothing of it has a gradient
    other = Distiller(copy.deepcopy(model), features=features)  # meant so
    with other.watching(model):
        assert other(model(X), X).isfinite()


def test_what_happened_since_the_copy_is_seen():
    model = network().eval()
    for change in (
        lambda m: prune(m),
        lambda m: m[0].weight.data.mul_(1.1),
        lambda m: nn.utils.parametrizations.weight_norm(m[0]),
        lambda m: m[2].register_forward_hook(lambda _m, _x, out: out * 0.5),
    ):
        student = copy.deepcopy(model)
        distiller = Distiller(student)
        change(student)
        assert distiller(student(X), X).isfinite()
    student = copy.deepcopy(model)
    assert Distiller(model)(student(X), X) == 0  # another network than the one that was copied


def test_soft_pruning_starts_from_the_network_that_was_copied():
    model = network()
    distiller = Distiller(model)
    pruner = PSAPPruner(model, X, budget=Budget(macs=0.5))
    pruner.start(torch.optim.SGD(model.parameters(), lr=0.1), total_steps=4)
    assert distiller(model(X), X).isfinite()


def test_a_distiller_can_be_copied():
    model = network()
    distiller = Distiller(model)
    for twin in (copy.deepcopy(distiller), pickle.loads(pickle.dumps(distiller))):
        assert torch.equal(twin.logits(X), distiller.logits(X))
