"""Search spaces in every form, the registry of methods, and statistics that trials share."""

import pytest
import torch
import torch_pruning as tp

from helpers.automl_cases import BATCHES, X, network, run
from tp_importance import CATROImportance, count_ops, prunable_groups
from tp_importance.automl import (
    METHODS,
    Choice,
    CurveStore,
    Float,
    Int,
    Parameter,
    SearchSpace,
    register_method,
    search_space,
)
from tp_importance.errors import SearchSpaceError
from tp_importance.pruning import registry


def test_registry_refuses_duplicates_and_takes_new_methods(monkeypatch):
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    monkeypatch.setattr(registry, "METHODS", registry._METHODS)
    with pytest.raises(ValueError, match="registered already"):
        register_method("catro", CATROImportance)
    with pytest.raises(ValueError, match="cannot be the name"):
        register_method("a.b", prune=print)
    with pytest.raises(TypeError):
        METHODS["x"] = METHODS["catro"]  # type: ignore[index]
    register_method("lamp", tp.importance.LAMPImportance, options={"p": Choice((1, 2))})
    model = network()
    assert run(model, {"method": "lamp", "lamp.p": 1})["macs"] <= 0.5 * count_ops(model, X)[0]
    assert [p.name for p in search_space(methods=["lamp"]).parameters] == ["method", "lamp.p"]


def test_space_in_every_form():
    groups = prunable_groups(network(), X)
    space = search_space(groups, methods=["catro", "fpgm"], per_group="ratio", budget={"macs": (0.2, 0.8)})
    assert SearchSpace.from_dict(space.to_dict()) == space
    nni = space.to_nni()
    assert nni["method"]["_value"][0] == {
        "_name": "catro",
        "catro.class_weight": {"_type": "uniform", "_value": [0.0, 1.0]},
    }
    assert set(nni) == {"method", "budget:macs", *(f"ratio:{n}" for n in groups.names)}
    plain = {"budget:macs": 0.5, **{f"ratio:{n}": 0.1 for n in groups.names}}
    nested = {"method": {"_name": "catro", "catro.class_weight": 0.5}, **plain}
    assert space.check(nested) == {"method": "catro", "catro.class_weight": 0.5, **plain}
    assert "catro.class_weight" not in space.check({"method": "fpgm", "catro.class_weight": 0.5, **plain})
    for bad in ({**plain}, {**nested, "more": 1}, {**nested, "budget:macs": 0.9}):
        with pytest.raises(SearchSpaceError):
            space.check(bad)
    assert SearchSpace((Parameter("n", Int(1, 4)),)).to_nni() == {"n": {"_type": "randint", "_value": [1, 5]}}


@pytest.mark.parametrize(
    "make",
    [
        lambda: Float(2, 1),
        lambda: Float(0, 1, log=True),
        lambda: Int(1, 2.5),
        lambda: Choice(()),
        lambda: SearchSpace((Parameter("a", Int(1, 2)), Parameter("a", Int(1, 2)))),
        lambda: SearchSpace((Parameter("catro.x", Int(1, 2), "catro"),)),
        lambda: search_space(methods="catro"),
        lambda: search_space(methods=["resconv"], per_group="ratio"),
        lambda: search_space(per_group="ratio"),
        lambda: search_space(budget={"macs": (0.5, 2.0)}),
        lambda: search_space(allocators=["gready"]),
        lambda: search_space(refit=["serial"]),
        lambda: search_space(methods=["resconv"], refit=["batchnorm", "parallel"]),
        lambda: SearchSpace.from_dict({"a": {"kind": "real"}}),
    ],
)
def test_wrong_spaces_are_refused(make):
    with pytest.raises(SearchSpaceError):
        make()


def test_statistics_are_collected_once(tmp_path):
    model = network()
    passes = []

    class Loader:
        def __iter__(self):
            passes.append(1)
            return iter(BATCHES)

    for space in ("consumer", "channel"):
        first = run(model, {"method": "catro", "catro.space": space}, statistics=tmp_path, loader=Loader(), refit=None)
        assert len(passes) == 1
        again = run(model, {"method": "catro", "catro.space": space}, statistics=tmp_path, loader=Loader(), refit=None)
        fresh = run(model, {"method": "catro", "catro.space": space}, refit=None)
        assert first == again == fresh and len(passes) == 1
        passes.clear()
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    run(model, {"method": "catro"}, statistics=tmp_path, loader=Loader(), refit=None)
    assert len(passes) == 1  # other weights, other statistics
    path = CurveStore(tmp_path, model).path("x", {})
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="delete it"):
        CurveStore(tmp_path, model).get("x", {}, lambda: pytest.fail("collected"))


def test_groups_are_verified_once(tmp_path, monkeypatch):
    verdicts = []

    def verify(groups, example_inputs):
        verdicts.append({groups.names[0]: "a test says so"})
        return verdicts[-1]

    monkeypatch.setattr("tp_importance.automl.statistics.verify_groups", verify)
    model, kept = network(), []
    first = prunable_groups(model, X, verify=False).names[0]
    for _ in range(2):
        run(model, {"method": "magnitude"}, statistics=tmp_path, keep=kept.append)
        assert len(verdicts) == 1 and kept[-1].get_submodule(first).out_channels == 8
    run(model, {"method": "magnitude"}, statistics=tmp_path, verify=False, keep=kept.append)
    assert len(verdicts) == 1 and kept[-1].get_submodule(first).out_channels < 8
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    run(model, {"method": "magnitude"}, statistics=tmp_path)
    assert len(verdicts) == 2
    for path in tmp_path.glob("verified-*.json"):
        path.write_text("nonsense")
    with pytest.raises(ValueError, match="delete it"):
        run(model, {"method": "magnitude"}, statistics=tmp_path)
