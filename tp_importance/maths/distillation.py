"""Knowledge distillation: the loss between the logits of two networks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["check_distillation", "distillation_loss", "feature_loss"]


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 4.0,
    weight: float = 0.9,
    classes: Sequence[int] | None = None,
) -> Tensor:
    r"""How far the student is from the teacher, and from the labels where there are any.

    With the softened probabilities :math:`p = \mathrm{softmax}(z^{teacher}/T)` and
    :math:`q = \mathrm{softmax}(z^{student}/T)`,

    .. math:: L = w \, T^2 \, \mathrm{KL}(p \,\|\, q) + (1 - w) \, \mathrm{CE}(z^{student}, labels),

    the mean over samples (and positions). Without labels :math:`L = T^2 \, \mathrm{KL}(p \,\|\, q)`. The factor
    :math:`T^2` keeps the gradient of the same size at every temperature. Computed in float32 at least; no gradient
    goes to the teacher.

    Args:
        student_logits: shape (N, K) or, one prediction per position, (N, K, ...).
        teacher_logits: the same shape; with ``classes`` the teacher may have any number of classes.
        labels: class indices, shape (N,) or (N, ...); or probabilities of the shape of ``student_logits``. They count
            the classes of the student.
        temperature: T > 0.
        weight: w in [0, 1], the share of the teacher; of no effect without labels.
        classes: columns of the teacher that the student kept, in the order of the student, as
            :func:`~tp_importance.slice_classifier` takes them.

    Returns:
        Scalar.

    Raises:
        ValueError: for shapes that do not fit, class indices that are no integers, columns that the teacher
            lacks and values out of range.

    Example:
        >>> student, teacher = torch.zeros(2, 3, requires_grad=True), torch.tensor([[9.0, 0, 0], [0, 0, 9.0]])
        >>> distillation_loss(teacher, teacher).item(), distillation_loss(student, teacher).item() > 1
        (0.0, True)
        >>> distillation_loss(student[:, :2], teacher, torch.tensor([0, 1]), classes=[0, 2]).item() > 1
        True

    References:
        Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015 (arXiv 1503.02531), section 2.
    """
    check_distillation(temperature, weight)
    if student_logits.dim() < 2:
        raise ValueError(f"student_logits have shape {tuple(student_logits.shape)}; give (N, K) or (N, K, ...)")
    if classes is not None:
        teacher_logits = _columns(teacher_logits, classes)
    if teacher_logits.shape != student_logits.shape:
        raise ValueError(
            f"teacher_logits have shape {tuple(teacher_logits.shape)}, student_logits {tuple(student_logits.shape)}; "
            "they must agree (a student with fewer classes: pass classes=)"
        )
    student, teacher = (_at_least_float32(z) for z in (student_logits, teacher_logits.detach()))
    log_p, log_q = (F.log_softmax(z / temperature, dim=1) for z in (teacher, student))
    divergence = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1).mean() * temperature**2
    if labels is None:
        return divergence
    expected = (len(student), *student.shape[2:])
    if labels.shape != student.shape and labels.shape != expected:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}; logits of shape {tuple(student.shape)} want indices of shape "
            f"{expected}, or probabilities of their own shape"
        )
    if labels.shape != student.shape and (labels.is_floating_point() or labels.dtype == torch.bool):
        raise ValueError(f"labels are of dtype {labels.dtype}; class indices are integers: labels.long()")
    return weight * divergence + (1 - weight) * F.cross_entropy(student, labels)


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Squared error of what a layer of the student puts out, relative to the energy of the teacher's.

    .. math:: \lVert s - t \rVert^2 / \lVert t \rVert^2 \quad\text{over the whole batch}

    Args:
        student: any shape.
        teacher: the same shape; no gradient goes there. Outputs that are all zero count as of energy 1.

    Returns:
        Scalar, float32 at least.

    Raises:
        ValueError: for shapes that differ.

    Example:
        >>> feature_loss(torch.tensor([[2.0, 1.0]]), torch.tensor([[2.0, 0.0]])).item()
        0.25

    References:
        Romero et al.: FitNets, 2015 (arXiv 1412.6550), equation 3; without their regressor, as no layer changes its
        width here, and made relative so that one weight fits all layers.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"the student's output has shape {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}")
    s, t = _at_least_float32(student), _at_least_float32(teacher.detach())
    energy = t.square().sum()
    return (s - t).square().sum() / torch.where(energy > 0, energy, torch.ones_like(energy))


def check_distillation(temperature: float, weight: float) -> None:
    """Check the options of :func:`distillation_loss`.

    Raises:
        ValueError: if one is out of range.
    """
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature={temperature} must be positive and finite; 2 to 4 are usual")
    if not 0 <= weight <= 1:
        raise ValueError(f"weight={weight} is the teacher's share of the loss; give a fraction in [0, 1]")


def _columns(logits: Tensor, classes: Sequence[int]) -> Tensor:
    chosen = [int(c) for c in classes]
    if logits.dim() < 2 or not chosen or min(chosen) < 0 or max(chosen) >= logits.shape[1]:
        raise ValueError(
            f"classes={chosen} must be columns of the teacher's logits, which have shape {tuple(logits.shape)}"
        )
    return logits.index_select(1, torch.tensor(chosen, device=logits.device))


def _at_least_float32(z: Tensor) -> Tensor:
    return z.to(torch.promote_types(z.dtype, torch.float32))
