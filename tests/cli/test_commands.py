"""The command line does what the Python interface does, with messages and an exit status."""

import subprocess
import sys

import pytest
import torch

pytest.importorskip("click")
pytest.importorskip("torchvision")
pytest.importorskip("PIL")

from click.testing import CliRunner
from PIL import Image

from tp_importance import Budget, count_ops, load_pruned
from tp_importance.cli.commands import main, minutes, number
from tp_importance.cli.images import ImageFolder
from tp_importance.cli.networks import network

NET = """
import torch
from torch import nn

def make(num_classes=3):
    torch.manual_seed(0)
    first = nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU()
    second = nn.Conv2d(8, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU()
    return nn.Sequential(*first, *second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes))

def number():
    return 3
"""


@pytest.fixture
def place(tmp_path):
    """A file that makes a network, and images of three classes."""
    (tmp_path / "net.py").write_text(NET)
    generator = torch.Generator().manual_seed(0)
    for label in "abc":
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(8):
            pixels = torch.randint(256, (40, 36, 3), generator=generator, dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(tmp_path / "images" / label / f"{i}.png")
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def options(place, *more):
    model = f"{place / 'net.py'}:make"
    return ["prune", "--model", model, "--data", place / "images", "--size", 32, "--out", place / "p.pt", *more]


@pytest.mark.parametrize("method", ["obs", "catro", "l1"])
def test_prune(method, place):
    found = run(*options(place, "--macs", 0.5, "--method", method, "--recover", "1s", "--batch-size", 8))
    assert found.exit_code == 0, found.output
    assert "24 images, 3 classes" in found.output and "saved: " in found.output and "recovered: " in found.output
    make = lambda: network(f"{place / 'net.py'}:make")  # noqa: E731
    model, x = load_pruned(make, place / "p.pt"), torch.randn(1, 3, 32, 32)
    assert count_ops(model, x)[0] <= 0.5 * count_ops(make(), x)[0] and model(x).shape == (1, 3)
    again = run(*options(place, "--macs", 0.5, "--method", method, "--refit", "none", "--round-to", 4))
    assert again.exit_code == 0 and load_pruned(make, place / "p.pt")[0].out_channels % 4 == 0


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_prune_with_weights_and_onnx(suffix, place):
    pytest.importorskip("onnxscript")
    make = f"{place / 'net.py'}:make"
    model, weights = network(make, classes=5), place / f"w{suffix}"
    torch.nn.init.constant_(model[-1].bias, 2.5)
    state = {f"module.{k}": v for k, v in model.state_dict().items()}
    if suffix == ".pt":
        torch.save({"state_dict": state}, weights)
    else:
        pytest.importorskip("safetensors.torch").save_file(state, weights)
    more = ("--weights", weights, "--classes", 5, "--onnx", place / "p.onnx", "--refit", "batchnorm")
    found = run(*options(place, "--params", 1200, *more))
    assert found.exit_code == 0, found.output
    pruned = load_pruned(lambda: network(make, classes=5), place / "p.pt")
    assert torch.equal(pruned[-1].bias, model[-1].bias) and sum(p.numel() for p in pruned.parameters()) <= 1200
    assert (place / "p.onnx").stat().st_size > 0


@pytest.mark.parametrize(
    ("more", "status", "message"),
    [
        ([], 2, "give --macs, --params or --latency"),
        (["--macs", "many"], 2, "Invalid value for '--macs'"),
        (["--macs", 0.5, "--recover", "soon"], 2, "must be a time such as 3min"),
        (["--macs", 1], 1, "the budget of 1 macs cannot be"),
        (["--macs", 0.5, "--model", "torchvision:resnet"], 1, "torchvision has no network 'resnet'"),
        (["--macs", 0.5, "--model", "resnet18"], 1, "must be torchvision:NAME"),
        (["--macs", 0.5, "--model", "nowhere.py:make"], 1, "there is no file nowhere.py"),
        (["--macs", 0.5, "--model", "nowhere:make"], 1, "cannot import 'nowhere'"),
        (["--macs", 0.5, "--pretrained"], 1, "--pretrained is for torchvision: and timm:"),
        (["--macs", 0.5, "--out", "/nowhere/p.pt"], 1, "cannot write /nowhere/p.pt"),
    ],
)
def test_errors_are_messages(more, status, message, place):
    found = run(*options(place, *more))
    assert (found.exit_code, "Traceback" in found.output) == (status, False)
    assert message in found.output and not (place / "p.pt").exists()


def test_what_is_no_network_no_weights_no_image(place):
    found = run(*options(place, "--macs", 0.5, "--model", f"{place / 'net.py'}:number"))
    assert found.exit_code == 1 and "gave a int, not a torch.nn.Module" in found.output
    (place / "w.pt").write_bytes(b"no weights")
    found = run(*options(place, "--macs", 0.5, "--weights", place / "w.pt"))
    assert found.exit_code == 1 and "cannot be read as weights" in found.output
    torch.save({"other": torch.zeros(2)}, place / "w.pt")
    found = run(*options(place, "--macs", 0.5, "--weights", place / "w.pt"))
    assert found.exit_code == 1 and "is of another network than Sequential" in found.output
    (place / "images" / "a" / "9.png").write_bytes(b"no image")
    found = run(*options(place, "--macs", 0.5))
    assert found.exit_code == 1 and "9.png cannot be read as an image" in found.output
    (place / "empty").mkdir()
    found = run(*options(place, "--macs", 0.5, "--data", place / "empty"))
    assert found.exit_code == 1 and "there is no image in it" in found.output


def test_inspect(place):
    found = run("inspect", "--model", f"{place / 'net.py'}:make", "--size", 32)
    assert found.exit_code == 0, found.output
    assert (
        "0: 8 channels, in 0, 1, 3" in found.output and "left out: 8 (3): produces the network's output" in found.output
    )
    assert "least within reach: " in found.output


def test_folders_without_classes(place):
    loader = ImageFolder(place / "images" / "a", count=5, batch_size=2, size=28)
    batches = list(loader)
    assert [len(x) for (x,) in batches] == [2, 2, 1] and len(loader) == 3 and loader.classes == []
    assert torch.equal(batches[0][0], next(iter(loader))[0]) and batches[0][0].shape == (2, 3, 28, 28)
    other = ImageFolder(place / "images" / "a", count=5, batch_size=2, size=28, seed=1)
    assert other.paths != loader.paths


def test_numbers_and_times():
    assert Budget(macs=number("0.5")) == Budget(macs=0.5) and number("1000000") == 1_000_000
    assert isinstance(number("1"), int) and isinstance(number("1.0"), float)
    assert (minutes("3min").minutes, minutes("90s").minutes, minutes("yes").minutes) == (3.0, 1.5, None)


def test_as_a_module():
    done = subprocess.run([sys.executable, "-m", "tp_importance", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "python -m tp_importance" in done.stdout and "inspect" in done.stdout
