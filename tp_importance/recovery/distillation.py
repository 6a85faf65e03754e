"""Distillation from the dense network: the loss to fine-tune a pruned one with, in the user's own loop."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..core.arguments import unwrapped_model
from ..core.batches import tensors_in
from ..core.copies import copied
from ..core.devices import to_model
from ..core.forward import ForwardFn, call_model
from ..maths.distillation import check_distillation, distillation_loss, feature_loss
from .features import named_layers, recorded

__all__ = ["Distiller", "distillation_loss"]


class Distiller:
    """Loss of a student against a frozen copy of its teacher; made before the network is pruned.

    The copy is in eval mode and without gradients, whatever happens to the original. It is no part of the student: its
    weights are not in the student's ``state_dict`` and not in its optimizer. It follows the student's outputs to their
    device and the inputs to their memory format, keeps its own dtype and runs under the autocast that the loss is
    computed in.

    Args:
        teacher: the dense network; copied.
        temperature: softens both distributions, see
            :func:`~tp_importance.maths.distillation.distillation_loss`.
        weight: the teacher's share of the loss where there are labels.
        classes: classes that the student kept, if not all.
        features: names of layers whose outputs the student is to reproduce as well, inside :meth:`watching`. Pruning
            must have kept their widths: in residual networks with pruned blocks, the stages.
        feature_weight: of the sum over these layers of
            :func:`~tp_importance.maths.distillation.feature_loss`, which is added to the loss. The default was
            the best of 5, 20 and 100 for two of three criteria (ResNet-20, 5,000 images).
        forward_fn: ``forward_fn(teacher, inputs)`` gives the logits; default: the inputs (tensor, tuple of positional
            or dict of keyword arguments) are moved to the teacher, which is called on them.

    Attributes:
        teacher: the copy.

    Raises:
        TypeError: if the teacher is no module or wrapped (``DistributedDataParallel``, ...), or its output no tensor.
        RuntimeError: if there are ``features`` and the student did not run inside :meth:`watching`.
        ValueError: for options out of range, unknown layers, and logits or features that do not fit; and if the student
            is the very network that was copied, and nothing has happened to it since.

    Example:
        >>> import torch_pruning as tp
        >>> from tp_importance import Budget, BudgetPruner
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 5))
        >>> x, y = torch.randn(4, 3, 3, 3), torch.tensor([0, 1, 2, 3])
        >>> distiller = Distiller(net)  # before pruning
        >>> _ = BudgetPruner(net, x, importance=tp.importance.MagnitudeImportance(), budget=Budget(macs=0.5)).step()
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        >>> loss = distiller(net(x), x, y)  # instead of cross_entropy(net(x), y); leave y out where there is none
        >>> loss.backward(); optimizer.step()

    References:
        Hinton, Vinyals, Dean 2015 (arXiv 1503.02531); the dense network as the teacher of its pruned self is ours only
        in this combination.
    """

    def __init__(
        self,
        teacher: nn.Module,
        *,
        temperature: float = 4.0,
        weight: float = 0.9,
        classes: Sequence[int] | None = None,
        features: Sequence[str] = (),
        feature_weight: float = 100.0,
        forward_fn: ForwardFn | None = None,
    ) -> None:
        if not isinstance(teacher, nn.Module):
            raise TypeError(f"teacher is of type {type(teacher).__name__}; pass the dense network, a torch.nn.Module")
        unwrapped_model(teacher, "teacher")
        check_distillation(temperature, weight)
        if not 0 <= feature_weight < float("inf"):
            raise ValueError(f"feature_weight={feature_weight} must be finite and at least 0, e.g. 100")
        named_layers(teacher, features)
        self.teacher = copied(teacher).eval().requires_grad_(False)
        self._original: weakref.ref[nn.Module] | None = weakref.ref(teacher)
        self._hooks, self._watched = _count_hooks(teacher), 0
        self.temperature, self.weight, self.forward_fn = temperature, weight, forward_fn
        self.classes = None if classes is None else list(classes)
        self.features, self.feature_weight = list(features), feature_weight
        self._student: dict[str, Tensor] = {}
        self._teacher: dict[str, Tensor] = {}

    @contextmanager
    def watching(self, student: nn.Module) -> Iterator[None]:
        """Note what the layers in ``features`` of a student put out, for the loss; around the training loop.

        Args:
            student: the pruned network, without a wrapper: of ``DistributedDataParallel`` its ``.module``.

        Raises:
            TypeError: if it is no module, or wrapped.
            ValueError: if it lacks such a layer.

        Example:
            >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
            >>> distiller, x = Distiller(net, features=["1"]), torch.randn(5, 3)
            >>> with distiller.watching(net), torch.no_grad():
            ...     distiller(net(x), x).item()
            0.0
        """
        with recorded(unwrapped_model(student, "student"), self.features, self._student):
            self._watched = len(self.features)
            try:
                yield
            finally:
                self._watched = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_original": None}  # a copy of the teacher's original is not the student

    def __call__(self, student_output: Tensor, inputs: Any, labels: Tensor | None = None) -> Tensor:
        """Loss of a batch, to be called ``backward()`` on.

        Args:
            student_output: logits of the student on ``inputs``, shape (N, K) or (N, K, ...).
            inputs: what the student was called with.
            labels: see :func:`~tp_importance.maths.distillation.distillation_loss`; ``None``: the teacher alone.

        Returns:
            Scalar.
        """
        if not isinstance(student_output, Tensor):
            raise TypeError(
                f"student_output is of type {type(student_output).__name__}; pass the logits, a tensor (of many "
                "libraries' outputs: output.logits)"
            )
        self._refuse_itself(student_output)
        with recorded(self.teacher, self.features, self._teacher):
            loss = distillation_loss(
                student_output,
                self.logits(inputs, student_output.device),
                labels,
                temperature=self.temperature,
                weight=self.weight,
                classes=self.classes,
            )
            for name in self.features:
                loss = loss + self.feature_weight * self._feature_loss(name)
        return loss

    def _refuse_itself(self, student_output: Tensor) -> None:
        """At the first loss to learn from: has anything happened to the network since it was copied?"""
        original = None if self._original is None else self._original()
        if original is None or student_output.grad_fn is None or not (self.weight or self.features):
            return
        gated = _count_hooks(original) - self._watched != self._hooks  # a soft pruning is at work
        if not gated and _unchanged(original, self.teacher) and _comes_from(student_output, original):
            raise ValueError(
                f"the student is the {type(original).__name__} that the teacher was copied from, unchanged, so it has "
                "nothing to learn from it: make the Distiller before pruning. To distil a network into itself all "
                "the same, give a copy: Distiller(copy.deepcopy(model))"
            )
        self._original = None  # looked at once

    def _feature_loss(self, name: str) -> Tensor:
        if name not in self._student:
            raise RuntimeError(
                f"features ask for the output of {name!r}, but the student did not run since the last loss: run it "
                "inside `with distiller.watching(student):`"
            )
        try:
            return feature_loss(self._student.pop(name), self._teacher.pop(name))  # pop: never one of an older batch
        except ValueError as error:
            raise ValueError(f"feature {name!r}: {error}; name layers whose width pruning kept") from error

    @torch.no_grad()  # not inference_mode: autograd refuses to keep such tensors for the student's backward pass
    def logits(self, inputs: Any, device: torch.device | str | None = None) -> Tensor:
        """Logits of the teacher, all its classes, without gradients.

        Args:
            inputs: as for :meth:`__call__`.
            device: where the teacher shall run; default: where it is.
        """
        self.teacher.to(device)
        _take_format(self.teacher, inputs)
        if self.forward_fn is not None:
            output = self.forward_fn(self.teacher, inputs)
        else:
            output = call_model(self.teacher, to_model(self.teacher, inputs))
        if not isinstance(output, Tensor):
            raise TypeError(
                f"the teacher's output is of type {type(output).__name__}, not its logits; pass "
                "forward_fn=lambda teacher, inputs: ... that gives them as a tensor"
            )
        return output


def _count_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def _unchanged(model: nn.Module, copied: nn.Module) -> bool:
    """Whether modules and all values are those of the copy; other precisions count as a change."""
    if [(n, type(m)) for n, m in model.named_modules()] != [(n, type(m)) for n, m in copied.named_modules()]:
        return False
    ours, theirs = dict(model.named_parameters()), dict(copied.named_parameters())
    return ours.keys() == theirs.keys() and all(
        p.shape == theirs[n].shape and p.dtype == theirs[n].dtype and not p.is_meta and p.equal(theirs[n].to(p.device))
        for n, p in ours.items()
    )


def _comes_from(output: Tensor, model: nn.Module) -> bool:
    """Whether a parameter of the model is in the graph of an output."""
    parameters = {id(p) for p in model.parameters()}
    waiting, seen = [output.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if id(getattr(node, "variable", None)) in parameters:
            return True
        waiting += [parent for parent, _ in node.next_functions]
    return False


def _take_format(model: nn.Module, inputs: Any) -> None:
    """Lay the weights out as the images are, which is what makes convolutions fast."""
    images = [x for x in tensors_in(inputs) if x.dim() == 4]
    last = [not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last) for x in images]
    layout = torch.channels_last if last and all(last) else torch.contiguous_format
    for weight in model.parameters():
        if weight.dim() == 4 and not weight.is_contiguous(memory_format=layout):
            weight.data = weight.data.contiguous(memory_format=layout)
