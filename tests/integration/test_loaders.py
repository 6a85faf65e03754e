"""Loaders as people have them: a last image by itself, dicts, without an end, empty, used up."""

import copy
from itertools import cycle, islice

import numpy as np
import pytest
import torch
from torch import nn

from helpers.states import weights
from tp_importance import (
    Budget,
    CATROPruner,
    ITPruner,
    ITPrunerImportance,
    OBSImportance,
    OBSPruner,
    Refit,
    prune,
    recalibrate_batchnorm,
    refitted_step,
)
from tp_importance.automl import prune_trial
from tp_importance.core.loaders import WholeBatches
from tp_importance.refitting.refit import refit_consumers
from tp_importance.statistics.observe import observe
from tp_importance.testing import class_loader, make_network

HALF = Budget(macs=0.5)
DATA = class_loader(32)
IMAGES, LABELS = (torch.cat(column) for column in zip(*DATA, strict=True))


def cut(*sizes):
    return list(zip(IMAGES.split(sizes), LABELS.split(sizes), strict=True))


ALL = len(IMAGES)
ONE_LEFT = cut(ALL - 17, 16, 1)


# -- a last batch that is too small


@pytest.mark.parametrize(("estimator", "last"), [("biased", 1), ("unbiased", 1), ("unbiased", 3)])
def test_a_short_last_batch_joins_the_one_before(estimator, last):
    model, x = make_network("plain")
    data, whole = cut(ALL - 16 - last, 16, last), cut(ALL - 16 - last, 16 + last)
    found, expected = (
        ITPrunerImportance(estimator=estimator, importance=OBSImportance()).collect(model, x, each)
        for each in (data, whole)
    )
    assert np.array_equal(found.nhsic, expected.nhsic) and found.relevance == expected.relevance
    assert found.observed.samples == ALL and found.observed.batches == 2


def test_by_every_way_to_itpruner():
    model, x = make_network("plain")
    ways = {
        "pruner": lambda m, data: ITPruner(m, x, data, budget=HALF).step(refit="sequential"),
        "prune": lambda m, data: prune(m, x, data, budget=HALF, method="itpruner"),
    }
    for way in ways.values():
        one, other = copy.deepcopy(model), copy.deepcopy(model)
        way(one, ONE_LEFT)
        way(other, cut(ALL - 17, 17))
        assert torch.equal(weights(one), weights(other))


@pytest.mark.parametrize("data", [cut(1, ALL - 1), cut(16, 1, ALL - 17), cut(*[1] * ALL), cut(1, ALL - 1)[:1]])
def test_other_small_batches_are_refused(data):
    model, x = make_network("plain")
    with pytest.raises(ValueError, match=r"a batch of 1 has no biased HSIC.*drop_last=True"):
        ITPruner(model, x, data, budget=HALF).plan()


@pytest.mark.parametrize(
    ("batches", "sizes"),
    [
        ([4, 4], [4, 4]),
        ([4, 1], [5]),
        ([4, 1, 4], [4, 1, 4]),
        ([4, 1, 1], [4, 1, 1]),
        ([1, 4], [1, 4]),
        ([4, 4, 1], [4, 5]),
        ([1], [1]),
        ([], []),
    ],
)
def test_which_batches_are_joined(batches, sizes):
    loader = [torch.arange(n).float()[:, None] for n in batches]
    found = list(WholeBatches(loader, 2))
    assert [len(b) for b in found] == sizes
    if loader:
        assert torch.equal(torch.cat(found), torch.cat(loader))


def test_what_cannot_be_joined_stays():
    for odd in (
        [(torch.zeros(4, 3), "names"), (torch.zeros(1, 3), "name")],
        [torch.zeros(4, 3), torch.zeros(1, 5)],
        [torch.zeros(4, 3), (torch.zeros(1, 3), torch.zeros(1))],
        [{"a": torch.zeros(4, 3), "n": torch.zeros(2)}, {"a": torch.zeros(1, 3), "n": torch.zeros(2)}],
        [torch.zeros(4, 3), torch.zeros(1, 3).double()],
    ):
        assert str(list(WholeBatches(odd, 2))) == str(odd)


def test_a_dict_is_joined_by_key():
    loader = [{"a": torch.zeros(3, 2), "labels": torch.zeros(3)}, {"a": torch.ones(1, 2), "labels": torch.ones(1)}]
    (batch,) = WholeBatches(loader, 2)
    assert batch["a"].tolist() == [[0, 0]] * 3 + [[1, 1]] and batch["labels"].tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("name", ["flat", "one position"])
def test_batch_norms_behind_one_position(name):
    """One image has no variance there; together with the batch before it has."""
    torch.manual_seed(0)
    head = [nn.Flatten(), nn.Linear(3 * 64, 5), nn.BatchNorm1d(5)]
    if name == "one position":
        head = [nn.Conv2d(3, 5, 8), nn.BatchNorm2d(5)]
    model = nn.Sequential(*head)
    twin = copy.deepcopy(model)
    recalibrate_batchnorm(model, [(torch.cat([x, x], 3)[..., :8, :8], y) for x, y in ONE_LEFT])
    recalibrate_batchnorm(twin, [(torch.cat([x, x], 3)[..., :8, :8], y) for x, y in cut(ALL - 17, 17)])
    norm, expected = model[-1], twin[-1]
    assert torch.equal(norm.running_mean, expected.running_mean) and torch.equal(norm.running_var, expected.running_var)
    assert norm.num_batches_tracked == len(ONE_LEFT)  # what the loader gave
    with pytest.raises(ValueError, match="drop_last=True"):
        recalibrate_batchnorm(model, [(torch.cat([x, x], 3)[..., :8, :8], y) for x, y in ONE_LEFT[-1:]])


@pytest.mark.parametrize("method", ["obs", "catro", "itpruner", "psap", "taylor", "l1"])
@pytest.mark.parametrize("refit", ["sequential", "parallel", "batchnorm"])
def test_every_method_takes_one_image_at_the_end(method, refit):
    model, x = make_network("plain")
    report = prune(model, x, ONE_LEFT, budget=HALF, method=method, refit=refit).report
    assert report.cost.macs <= 0.5 * report.dense.macs
    assert all(torch.isfinite(t).all() for t in model.state_dict().values())


# -- dicts


class Image(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = make_network("plain")[0]

    def forward(self, image):
        return self.net(image)


USES = {
    "prune": lambda m, x, data, **o: prune(m, x, data, budget=HALF, method="catro", **o),
    "itpruner": lambda m, x, data, **o: ITPruner(m, x, data, budget=HALF, **o).step(
        refit=Refit("sequential", recalibrate=False)
    ),
    "obs": lambda m, x, data, **o: OBSPruner(m, x, data, budget=HALF, **o).step(
        refit=Refit("parallel", recalibrate=False)
    ),
    "taylor": lambda m, x, data, **o: prune(m, x, data, budget=HALF, method="taylor", **o),
}


@pytest.mark.parametrize("use", USES)
def test_dicts_with_other_keys(use):
    loader = [{"pixels": x, "target": y} for x, y in DATA]
    model, x = Image(), DATA[0][0][:2]
    labelled = {"label_fn": lambda batch: batch["target"]}  # as the message says
    if use in ("prune", "taylor"):
        with pytest.raises(
            ValueError, match=r"dicts with pixels, target;.*pass label_fn=lambda batch: batch\['target'"
        ):
            USES[use](model, x, loader)
    with pytest.raises(TypeError, match="unexpected keyword argument 'pixels'") as error:
        USES[use](model, x, loader, **labelled)
    (note,) = error.value.__notes__
    assert "called with the keyword arguments pixels, target" in note
    assert "forward_fn=lambda model, batch: model(batch['pixels'])" in note
    assert "Where labels are needed, pass label_fn=lambda batch: batch['target']" in note
    options = {**labelled, "forward_fn": lambda model, batch: model(batch["pixels"])}  # as the note says
    twin = copy.deepcopy(model)
    USES[use](model, {"pixels": x}, loader, **options)
    USES[use](twin, x, [{"image": x, "labels": y} for x, y in DATA])
    torch.testing.assert_close(weights(model), weights(twin))


def test_dicts_inside_of_pairs():
    loader = [({"pixels": x}, y) for x, y in DATA]
    with pytest.raises(TypeError) as error:
        observe(Image(), loader, [])
    (note,) = error.value.__notes__
    assert "keyword arguments pixels." in note and "model(batch[0]['pixels'])" in note and "label_fn=" not in note


# -- refit=


BAD_MODES = {
    "prune": ("refit", lambda m, x, v: prune(m, x, DATA, budget=HALF, refit=v)),
    "step": ("refit", lambda m, x, v: CATROPruner(m, x, DATA, budget=HALF).step(refit=v)),
    "refit_consumers": ("refit", lambda m, x, v: refit_consumers(m, x, DATA, {}, v)),
    "refit_consumers by name": ("refit", lambda m, x, v: refit_consumers(m, x, DATA, {}, refit=v)),
    "refitted_step": ("refit", lambda m, x, v: refitted_step(None, x, DATA, v)),
    "of": ("refit", lambda m, x, v: Refit.of(v)),
    "trial": (
        "refit",
        lambda m, x, v: prune_trial(
            m, {"method": "l1"}, example_inputs=x, evaluate=lambda m: 0.0, budget=HALF, loader=DATA, refit=v
        ),
    ),
    "parameter": (
        "refit",
        lambda m, x, v: prune_trial(
            m, {"method": "l1", "refit": v}, example_inputs=x, evaluate=lambda m: 0.0, budget=HALF, loader=DATA
        ),
    ),
}


@pytest.mark.parametrize("use", BAD_MODES)
def test_unknown_ways_to_refit(use):
    argument, call = BAD_MODES[use]
    model, x = make_network("plain")
    with pytest.raises(ValueError, match=rf"^{argument}='seq' is unknown; choose .*'sequential', 'parallel'"):
        call(model, x, "seq")
    with pytest.raises((TypeError, ValueError), match=rf"^{argument}=3 "):
        call(model, x, 3)


def test_masks_of_nni_too():
    pytest.importorskip("nni")
    from nni_plugins import refit_masks

    model, x = make_network("plain")
    rows = torch.ones(8, 1, 1, 1)
    rows[0] = 0
    with pytest.raises(ValueError, match=r"^refit='seq' is unknown"):
        refit_masks(model, {"0.0": {"weight": rows}}, DATA, x, "seq")


# -- no end, nothing, once


class Endless:
    def __iter__(self):
        return cycle(DATA)


def test_an_endless_loader_stops_at_the_samples():
    (model, x), twin = make_network("plain"), make_network("plain")[0]
    prune(model, x, Endless(), budget=HALF, samples=ALL)
    prune(twin, x, DATA, budget=HALF)
    assert torch.equal(weights(model), weights(twin))


@pytest.mark.parametrize("use", ["observe", "recalibrate", "pruner"])
def test_a_cycle_is_refused(use):
    model, x = make_network("plain")
    uses = {
        "observe": lambda: observe(model, cycle(DATA), []),
        "recalibrate": lambda: recalibrate_batchnorm(model, cycle(DATA)),
        "pruner": lambda: CATROPruner(model, x, cycle(DATA), budget=HALF),
    }
    with pytest.raises(TypeError, match=r"itertools\.cycle, which never ends; pass its first batches, list\("):
        uses[use]()


@pytest.mark.parametrize("method", ["obs", "itpruner", "taylor"])
def test_an_empty_loader(method):
    model, x = make_network("plain")
    with pytest.raises(ValueError, match="the loader gave no batch"):
        prune(model, x, [], budget=HALF, method=method)


@pytest.mark.parametrize("once", [lambda: iter(DATA), lambda: (b for b in DATA), lambda: islice(DATA, 2)])
def test_a_loader_that_is_used_up(once):
    model, x = make_network("plain")
    with pytest.raises(TypeError, match=r"gives its batches only once.*list\(loader\)"):
        prune(model, x, once(), budget=HALF)


def test_a_loader_may_use_its_memory_again():
    buffer, images = torch.zeros(4, 3), torch.arange(36.0).view(12, 3)

    class Reusing:
        def __iter__(self):
            for part in images.split(4):
                yield buffer.copy_(part)

    net = nn.Sequential(nn.BatchNorm1d(3))
    recalibrate_batchnorm(net, Reusing())
    torch.testing.assert_close(net[0].running_mean, images.mean(0))
