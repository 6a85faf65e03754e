import math

import pytest
import torch
import torch.nn.functional as F

from tp_importance.maths.distillation import distillation_loss, feature_loss


def logits(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


def direct(student, teacher, labels, temperature, weight):
    """Sample by sample, class by class."""
    total = 0.0
    for s, t, y in zip(student.tolist(), teacher.tolist(), labels.tolist(), strict=True):
        q, p, one = ([math.exp(v / d) for v in z] for z, d in ((s, temperature), (t, temperature), (s, 1.0)))
        q, p, one = ([v / sum(z) for v in z] for z in (q, p, one))
        kl = sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
        total += weight * temperature**2 * kl - (1 - weight) * math.log(one[y])
    return total / len(student)


@pytest.mark.parametrize(("temperature", "weight"), [(4.0, 0.9), (1.0, 0.5), (2.5, 0.0), (3.0, 1.0)])
def test_value_is_the_formula(temperature, weight):
    student, teacher, labels = logits(7, 5), logits(7, 5, seed=1), torch.arange(7) % 5
    value = distillation_loss(student, teacher, labels, temperature=temperature, weight=weight)
    assert float(value) == pytest.approx(direct(student, teacher, labels, temperature, weight), rel=1e-10)


def test_without_labels_the_weight_counts_for_nothing():
    student, teacher = logits(4, 3), logits(4, 3, seed=1)
    values = [distillation_loss(student, teacher, weight=w) for w in (0.0, 0.3, 1.0)]
    assert values[0] == values[1] == values[2] > 0
    assert values[0] == distillation_loss(student, teacher, torch.zeros(4, dtype=torch.long), weight=1.0)


def test_weight_zero_is_cross_entropy():
    student, teacher, labels = logits(4, 3), logits(4, 3, seed=1), torch.tensor([0, 2, 1, 1])
    torch.testing.assert_close(
        distillation_loss(student, teacher, labels, weight=0.0), F.cross_entropy(student, labels)
    )


def test_gradients_only_to_the_student():
    student, teacher = logits(4, 3).requires_grad_(), logits(4, 3, seed=1).requires_grad_()
    distillation_loss(student, teacher, torch.tensor([0, 2, 1, 1])).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


def test_size_of_the_gradient_hardly_depends_on_a_high_temperature():
    student, teacher = logits(4, 3).requires_grad_(), logits(4, 3, seed=1)
    norms = [
        torch.autograd.grad(distillation_loss(student, teacher, temperature=t), student)[0].norm() for t in (40, 400)
    ]
    assert norms[0] / norms[1] == pytest.approx(1, abs=0.1)


def test_one_prediction_per_position():
    student, teacher, labels = logits(2, 3, 4, 5), logits(2, 3, 4, 5, seed=1), torch.ones(2, 4, 5, dtype=torch.long)
    rows = [z.movedim(1, -1).reshape(-1, 3) for z in (student, teacher)]
    torch.testing.assert_close(
        distillation_loss(student, teacher, labels), distillation_loss(*rows, labels.reshape(-1))
    )


def test_labels_may_be_probabilities():
    student, teacher, labels = logits(4, 3), logits(4, 3, seed=1), torch.tensor([0, 2, 1, 1])
    torch.testing.assert_close(
        distillation_loss(student, teacher, F.one_hot(labels, 3).double()), distillation_loss(student, teacher, labels)
    )


def test_class_subset_reads_its_columns_in_order():
    student, teacher, labels = logits(4, 2), logits(4, 5, seed=1), torch.tensor([0, 1, 1, 0])
    assert distillation_loss(student, teacher, labels, classes=[3, 1]) == distillation_loss(
        student, teacher[:, [3, 1]], labels
    )


def test_computes_in_float32_at_least():
    student, teacher = logits(4, 3), logits(4, 3, seed=1)
    half = distillation_loss(student.bfloat16(), teacher.bfloat16())
    assert half.dtype == torch.float32 and distillation_loss(student, teacher).dtype == torch.float64
    assert half == distillation_loss(student.bfloat16().float(), teacher.bfloat16().float())


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ((torch.zeros(3), torch.zeros(3)), {}, r"student_logits have shape \(3,\)"),
        ((torch.zeros(2, 3), torch.zeros(2, 4)), {}, r"\(2, 4\), student_logits \(2, 3\).*classes="),
        ((torch.zeros(2, 3), torch.zeros(1, 3)), {}, r"\(1, 3\), student_logits \(2, 3\)"),
        ((torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 1)), {}, r"labels have shape \(2, 1\).*\(2,\)"),
        ((torch.zeros(2, 2), torch.zeros(2, 4)), {"classes": [0, 4]}, r"classes=\[0, 4\].*\(2, 4\)"),
        ((torch.zeros(2, 2), torch.zeros(2, 4)), {"classes": []}, r"classes=\[\]"),
        ((torch.zeros(2, 3), torch.zeros(2, 3)), {"temperature": 0.0}, "temperature=0.0"),
        ((torch.zeros(2, 3), torch.zeros(2, 3)), {"temperature": math.nan}, "temperature=nan"),
        ((torch.zeros(2, 3), torch.zeros(2, 3)), {"weight": 1.5}, "weight=1.5"),
    ],
)
def test_bad_input_is_named(arguments, options, words):
    with pytest.raises(ValueError, match=words):
        distillation_loss(*arguments, **options)


def test_feature_loss_is_relative_and_moves_the_student_only():
    student, teacher = logits(2, 3, 4).requires_grad_(), logits(2, 3, 4, seed=1).requires_grad_()
    value = feature_loss(student, teacher)
    expected = sum((a - b) ** 2 for a, b in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True))
    assert value.item() == pytest.approx(expected / sum(b * b for b in teacher.flatten().tolist()))
    torch.testing.assert_close(feature_loss(10 * student, 10 * teacher), value)
    value.backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None


def test_feature_loss_of_silent_layers_and_of_other_shapes():
    assert feature_loss(torch.full((2, 2), 3.0), torch.zeros(2, 2)) == 36
    with pytest.raises(ValueError, match=r"\(2, 3\), the teacher's \(2, 4\)"):
        feature_loss(torch.zeros(2, 3), torch.zeros(2, 4))
