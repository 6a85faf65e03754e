"""Losses for criteria that look at gradients: networks and labels of every kind."""

import copy
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, nn

from helpers.states import same_state, state, weights
from tp_importance import Budget, GradientImportance, PSAPImportance, prune
from tp_importance.automl import BudgetProblem, prune_trial
from tp_importance.statistics.gradients import loss_gradients, loss_of
from tp_importance.testing import class_loader, make_network

HALF = Budget(macs=0.5)
DATA = class_loader(32)


class Named(NamedTuple):
    aux: Tensor
    scores: Tensor


@dataclass
class Fields:
    loss: None
    logits: Tensor


FORMS = {
    "tuple": (lambda y: (y, y.detach()), "tuple", "output[0]", lambda o: o[0]),
    "list": (lambda y: [y, y], "list", "output[0]", lambda o: o[0]),
    "dict": (lambda y: {"logits": y, "aux": y}, "dict", "output['logits']", lambda o: o["logits"]),
    "other key": (lambda y: {"scores": y, "aux": y}, "dict", "output['scores']", lambda o: o["scores"]),
    "named": (lambda y: Named(y, y), "Named", "output.aux", lambda o: o.aux),
    "dataclass": (lambda y: Fields(None, y), "Fields", "output.logits", lambda o: o.logits),
}


class Returning(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.net, self.form = make_network("plain")[0], form

    def forward(self, x):
        return self.form(self.net(x))


# -- networks that return more than their logits


@pytest.mark.parametrize("method", ["taylor", "psap"])
@pytest.mark.parametrize("form", [f for f in FORMS if f != "dataclass"])
def test_any_output_with_a_loss_and_a_message_without(form, method):
    wrap, kind, found, take = FORMS[form]
    model, x = Returning(wrap), DATA[0][0][:2]
    plain = copy.deepcopy(model.net)
    before = state(model)
    with pytest.raises(TypeError) as error:
        prune(model, x, DATA, budget=HALF, method=method)
    assert f"the network returns a {kind}" in str(error.value)
    assert f"loss_fn=lambda output, labels: F.cross_entropy({found}, labels)" in str(error.value)
    assert same_state(model, before) and not any(m._forward_hooks for m in model.modules())

    def loss_fn(output, labels):
        return F.cross_entropy(take(output), labels)

    prune(model, x, DATA, budget=HALF, method=method, loss_fn=loss_fn)
    prune(plain, x, DATA, budget=HALF, method=method)
    assert torch.equal(weights(model), weights(plain))


def test_objects_with_fields_are_named_too():
    wrap, kind, found, _ = FORMS["dataclass"]
    with pytest.raises(TypeError, match=rf"returns a {kind}, .*F.cross_entropy\({found}, labels\)"):
        loss_of(F.cross_entropy, wrap(torch.zeros(2, 3)), torch.tensor([0, 1]))


@pytest.mark.parametrize("method", ["taylor", "psap"])
def test_the_loss_decides_what_goes(method):
    (model, x), losses = make_network("plain"), []
    twin = copy.deepcopy(model)

    def loss_fn(output, labels):
        losses.append(len(labels))
        return F.cross_entropy(output * torch.tensor([1.0, 0.0, 0.0, 9.0]), labels)

    prune(model, x, DATA, budget=HALF, method=method, loss_fn=loss_fn, refit="batchnorm")
    prune(twin, x, DATA, budget=HALF, method=method, refit="batchnorm")
    assert losses == [len(y) for _, y in DATA] and not torch.equal(weights(model), weights(twin))


@pytest.mark.parametrize("method", ["taylor", "psap"])
def test_in_a_search(method):
    wrap, _, _, take = FORMS["tuple"]
    model, x = Returning(wrap), DATA[0][0][:2]
    loader = [{"x": images, "target": labels} for images, labels in DATA]
    calls = {
        "forward_fn": lambda m, batch: m(batch["x"] if isinstance(batch, dict) else batch),
        "label_fn": lambda batch: batch["target"],
    }

    def trial(network, data, **options):
        return prune_trial(
            network,
            {"method": method},
            example_inputs=x,
            loader=data,
            budget=HALF,
            evaluate=lambda net: float(weights(net).sum()),
            refit=None,
            latency_seconds=None,
            **options,
        )

    def loss_fn(output, labels):
        return F.cross_entropy(take(output), labels)

    assert trial(model, loader, loss_fn=loss_fn, **calls) == trial(model.net, DATA)
    found = BudgetProblem.prepare(model, x, loader, budget=HALF, methods=[method], loss_fn=loss_fn, **calls)
    expected = BudgetProblem.prepare(model.net, x, DATA, budget=HALF, methods=[method])
    assert found.losses == expected.losses
    with pytest.raises(TypeError, match="returns a tuple"):
        trial(model, loader, **calls)


# -- a loss that nobody would use


@pytest.mark.parametrize("method", ["obs", "catro", "l1", "itpruner", "random"])
def test_a_loss_without_use_is_refused(method):
    model, x = make_network("plain")
    before = state(model)
    with pytest.raises(ValueError, match=rf"method='{method}' looks at no loss.*leave it out"):
        prune(model, x, DATA, budget=HALF, method=method, loss_fn=F.cross_entropy)
    assert same_state(model, before)


def test_objects_have_a_loss_of_their_own():
    model, x = make_network("plain")
    with pytest.raises(ValueError, match=r"give it the loss, method=PSAPImportance\(loss_fn=\.\.\.\)"):
        prune(model, x, DATA, budget=HALF, method=PSAPImportance(), loss_fn=F.cross_entropy)
    with pytest.raises(ValueError, match=r"comes as an object.*GradientImportance\(TaylorImportance\(\), loss_fn="):
        prune(model, x, DATA, budget=HALF, method=tp.importance.TaylorImportance(), loss_fn=F.cross_entropy)
    twin = copy.deepcopy(model)
    taylor = GradientImportance(tp.importance.TaylorImportance(), loss_fn=F.cross_entropy)  # as the message says
    prune(model, x, DATA, budget=HALF, method=taylor)
    prune(twin, x, DATA, budget=HALF, method="taylor")
    assert torch.equal(weights(model), weights(twin))


@pytest.mark.parametrize(
    ("loss_fn", "said"),
    [(nn.CrossEntropyLoss, r"loss_fn=CrossEntropyLoss is a class; make one of it"), ("mse", "loss_fn='mse' must be a")],
)
def test_what_is_no_loss_is_refused_at_once(loss_fn, said):
    model, x = make_network("plain")
    for use in (
        lambda: prune(model, x, DATA, budget=HALF, method="taylor", loss_fn=loss_fn),
        lambda: loss_gradients(model, DATA, loss_fn).__enter__(),
        lambda: PSAPImportance(loss_fn=loss_fn),
        lambda: prune_trial(model, {}, example_inputs=x, evaluate=lambda m: 0.0, loss_fn=loss_fn),
    ):
        with pytest.raises(TypeError, match=said):
            use()


# -- labels


LOGITS = torch.randn(4, 3, requires_grad=True)
MAPS = torch.randn(2, 3, 5, 5, requires_grad=True)
INDICES = torch.tensor([0, 2, 1, 1])


@pytest.mark.parametrize(
    ("logits", "labels", "indices"),
    [
        (LOGITS, INDICES, INDICES),
        (LOGITS, INDICES.int(), INDICES),
        (LOGITS, INDICES.to(torch.uint8), INDICES),
        (LOGITS, INDICES.tolist(), INDICES),
        (LOGITS, F.one_hot(INDICES, 3).float(), INDICES),
        (MAPS, torch.full((2, 5, 5), 2), torch.full((2, 5, 5), 2)),
        (LOGITS, torch.tensor([0, -100, 1, -100]), torch.tensor([0, -100, 1, -100])),
    ],
)
@pytest.mark.parametrize("loss_fn", [F.cross_entropy, nn.CrossEntropyLoss()])
def test_labels_that_the_cross_entropy_takes(logits, labels, indices, loss_fn):
    assert torch.allclose(loss_of(loss_fn, logits, labels), F.cross_entropy(logits, indices))


@pytest.mark.parametrize(
    ("logits", "labels", "error", "said"),
    [
        (LOGITS, INDICES.float(), ValueError, r"shape \(4,\) and dtype float32; .*labels\.long\(\)"),
        (LOGITS, F.one_hot(INDICES, 3), ValueError, r"shape \(4, 3\); .*one-hot labels their argmax\(1\)"),
        (LOGITS, INDICES[:3], ValueError, r"shape \(3,\); logits of shape \(4, 3\) want .* \(4,\)"),
        (LOGITS, INDICES > 0, TypeError, "dtype torch.bool; integer class indices"),
        (LOGITS, INDICES + 1, ValueError, "label 3 is out of range for an output of 3 classes"),
        (LOGITS, INDICES - 1, ValueError, "label -1 is out of range for an output of 3 classes"),
        (MAPS, torch.tensor([0, 1]), ValueError, r"shape \(2,\); .*class indices of shape \(2, 5, 5\)"),
        (LOGITS[:, 0], INDICES, ValueError, r"a tensor of shape \(4,\).*takes logits of shape \(N, classes"),
    ],
)
@pytest.mark.parametrize("loss_fn", [F.cross_entropy, nn.CrossEntropyLoss()])
def test_labels_that_it_does_not_take(logits, labels, error, said, loss_fn):
    with pytest.raises(error, match=said):
        loss_of(loss_fn, logits, labels)


def test_bad_labels_leave_the_network_as_it_was():
    model, x = make_network("plain")
    before, data = state(model), [(images, labels.float()) for images, labels in DATA]
    with pytest.raises(ValueError, match=r"labels are .*float32.*or pass loss_fn=, if this is no classification"):
        prune(model, x, data, budget=HALF, method="taylor")
    assert same_state(model, before) and not model.training and all(p.grad is None for p in model.parameters())
    # floating targets of the right loss
    prune(model, x, data, budget=HALF, method="taylor", loss_fn=lambda out, y: F.mse_loss(out[:, 0], y))


# -- losses


@pytest.mark.parametrize(
    ("loss_fn", "error", "said"),
    [
        (lambda o, y: F.cross_entropy(o, y, reduction="none"), ValueError, r"of shape \(4,\); it must give one number"),
        (lambda o, y: F.cross_entropy(o, y) * float("nan"), ValueError, "the loss of a batch is nan; check"),
        (lambda o, y: F.cross_entropy(o, y) / 0, ValueError, "the loss of a batch is inf"),
        (lambda o, y: F.cross_entropy(o, y).item(), TypeError, "loss_fn gives a float; it must give a tensor"),
        (lambda o, y: F.cross_entropy(o.detach(), y), ValueError, "does not depend on the network's parameters"),
    ],
)
def test_losses_that_are_none(loss_fn, error, said):
    net = nn.Linear(2, 3)
    with pytest.raises(error, match=said), loss_gradients(net, [(torch.ones(4, 2), INDICES)], loss_fn):
        pass
    assert net.weight.grad is None and net.training


def test_errors_of_the_loss_say_what_it_was_called_with():
    with pytest.raises(KeyError) as error:
        loss_of(lambda output, labels: output["logits"], {"scores": LOGITS}, INDICES)
    assert error.value.__notes__ == [
        "loss_fn(output, labels) was called with a dict and a tensor of shape (4,) and dtype int64"
    ]


def test_targets_of_any_form_reach_the_loss():
    net = nn.Linear(2, 3)
    batch = {"input": torch.ones(4, 2), "boxes": {"a": torch.zeros(4, 3)}}
    options = {"forward_fn": lambda model, batch: model(batch["input"]), "label_fn": lambda batch: batch["boxes"]}
    with loss_gradients(net, [batch], lambda output, target: F.mse_loss(output, target["a"]), **options):
        assert net.weight.grad is not None and bool(net.weight.grad.any())
