"""Factories and files that do not fit, and writes that fail."""

import os
import pickle
from functools import partial

import pytest
import torch
from torch import nn

from helpers.checkpoint_cases import mobilenet, resnet
from tp_importance.checkpoints.checkpoint import load_pruned, save_pruned


def test_other_network(path):
    save_pruned(resnet(), path)
    with pytest.raises(ValueError, match=r"the file holds a .*ResNet, the factory builds a .*MobileNetV3"):
        load_pruned(mobilenet, path)


class Extra(nn.Module):
    def __init__(self, extra=False):
        super().__init__()
        if extra:
            self.gain = nn.Parameter(torch.ones(1))


@pytest.mark.parametrize("saved", [True, False])
def test_user_parameter_on_one_side_only(path, saved):
    save_pruned(nn.Sequential(Extra(saved)), path)
    with pytest.raises(ValueError, match=r"'0\.gain'"):
        load_pruned(lambda: nn.Sequential(Extra(not saved)), path)


@pytest.mark.parametrize("factory", [None, 3, nn.Linear(2, 2), lambda: None])
def test_factory_of_wrong_type(path, factory):
    save_pruned(nn.Linear(2, 2), path)
    with pytest.raises(TypeError, match="factory"):
        load_pruned(factory, path)


class Sized(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc = nn.Linear(width, 2)


def failing(error):
    def build(width=3):
        raise error

    return build


def given(x, *more):
    return Sized(x)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (
            Sized,
            r"factory Sized could.*missing 1 .*'width'\): give a function without arguments, .*lambda: Sized\(\.\.\.\)",
        ),
        (partial(given), r"factory given could.*lambda: given\(\.\.\.\)"),
        (lambda width: Sized(width), r"factory <lambda> could.*lambda: Net\(\.\.\.\)"),
        (failing(TypeError("inside")), r"factory build could not build the network \(inside\): it must build"),
        (partial(Sized, "3"), r"factory Sized could.*it must build the network when it is called without arguments"),
    ],
)
def test_factory_that_cannot_be_called(path, factory, message):
    save_pruned(Sized(3), path)
    with pytest.raises(TypeError, match=message) as caught:
        load_pruned(factory, path)
    assert isinstance(caught.value.__cause__, TypeError)


@pytest.mark.parametrize("error", [KeyError("depth"), RuntimeError("no memory"), OSError("no weights")])
def test_factory_that_raises(path, error):
    save_pruned(Sized(3), path)
    with pytest.raises(
        ValueError, match=f"factory build could not build the network .{type(error).__name__}"
    ) as caught:
        load_pruned(failing(error), path)
    assert caught.value.__cause__ is error


def test_unreadable_files(path, tmp_path):
    for content in (b"", b"garbage", pickle.dumps({"format": 1}, protocol=2), b"PK\x03\x04 not a zip"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="save_pruned"):
            load_pruned(resnet, path)
    for wrong in (nn.Linear(2, 2).state_dict(), nn.Linear(2, 2), [1]):
        torch.save(wrong, path)
        with pytest.raises(ValueError, match="save_pruned"):
            load_pruned(resnet, path)
    for missing in (tmp_path, tmp_path / "none.pt"):
        with pytest.raises(ValueError, match="is not a file"):
            load_pruned(resnet, missing)
    torch.save({"format": "tp_importance.pruned", "version": 99}, path)
    with pytest.raises(ValueError, match="version 99"):
        load_pruned(resnet, path)


def test_truncated_file(path):
    save_pruned(nn.Linear(50, 50), path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ValueError, match="damaged"):
        load_pruned(lambda: nn.Linear(50, 50), path)


def test_refused_arguments(path, tmp_path):
    with pytest.raises(TypeError, match=r"nn\.Module"):
        save_pruned({"weight": 1}, path)
    for wrong in (3, b"x.pt", open):
        with pytest.raises(TypeError, match="path"):
            save_pruned(nn.ReLU(), wrong)
        with pytest.raises(TypeError, match="path"):
            load_pruned(nn.ReLU, wrong)
    for wrong in (tmp_path, tmp_path / "none" / "x.pt"):
        with pytest.raises(ValueError, match="folder"):
            save_pruned(nn.ReLU(), wrong)


class Stateful(nn.Module):
    def get_extra_state(self):
        return {"any": object()}


def test_extra_state_is_refused_when_saving(path):
    with pytest.raises(ValueError, match=r"layer '0'.*extra state"):
        save_pruned(nn.Sequential(Stateful()), path)
    assert not path.exists()


# Writing.


def test_failed_write_keeps_the_old_file(path, monkeypatch):
    save_pruned(nn.Linear(2, 2), path)
    before = path.read_bytes()

    def broken(content, file):
        file.write(b"half a file")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match="disk full"):
        save_pruned(nn.Linear(3, 3), path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_failed_replace_leaves_nothing(path, monkeypatch):
    def broken(*_):
        raise PermissionError("no")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(PermissionError):
        save_pruned(nn.Linear(3, 3), path)
    assert os.listdir(path.parent) == []


def test_overwrite_links_and_strings(path, tmp_path, monkeypatch):
    link = tmp_path / "link.pt"
    save_pruned(nn.Linear(2, 2), path)
    link.symlink_to(path)
    save_pruned(nn.Linear(3, 3), str(link))
    assert link.is_symlink() and load_pruned(lambda: nn.Linear(1, 1), path).in_features == 3
    monkeypatch.chdir(tmp_path)
    save_pruned(nn.Linear(4, 4), "bare")
    assert sorted(os.listdir()) == ["bare", "link.pt", "pruned.pt"]
    umask = os.umask(0)
    os.umask(umask)
    assert os.stat("bare").st_mode & 0o777 == 0o666 & ~umask


def test_saving_changes_nothing(path):
    model = resnet().train()
    state = {n: t.clone() for n, t in model.state_dict().items()}
    save_pruned(model, path)
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items()) and model.training
