"""``python -m tp_importance prune`` and ``inspect``: what the Python interface does, for a network with a name."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from ..budget import Budget
from ..checkpoints.checkpoint import save_pruned
from ..core.progress import LOGGER
from ..export.onnx import export_onnx
from ..one_shot import prune as prune_network
from ..pruning.registry import METHODS
from ..pruning.target import PruningTarget
from ..recovery.settings import Recovery
from .images import IMAGENET, ImageFolder
from .networks import load_weights, network

__all__ = ["main"]

ATTENTION = ("heads", "dims", "none")
REFITS = ("sequential", "parallel", "batchnorm", "none")


def number(text: str) -> float | int:
    """``0.5`` is a fraction, ``1000000`` a count."""
    return int(text) if re.fullmatch(r"\d+", text) else float(text)


def minutes(text: str) -> Recovery:
    """``3min``, ``90s``, or ``yes`` for as long as it takes by default."""
    if text == "yes":
        return Recovery()
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(min|s)", text)
    if found is None:
        raise click.BadParameter(f"{text!r} must be a time such as 3min or 90s, or yes", param_hint="--recover")
    return Recovery(minutes=float(found[1]) / (60 if found[2] == "s" else 1))


def of_network(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of every command that needs a network."""
    for option in reversed(
        (
            click.option(
                "--model", "name", required=True, help="torchvision:NAME, timm:NAME, module:FUNCTION or f.py:F"
            ),
            click.option("--weights", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="state dict"),
            click.option("--pretrained", is_flag=True, help="weights that torchvision or timm download"),
            click.option("--classes", type=click.IntRange(1), help="outputs of the network"),
            click.option("--size", default=224, show_default=True, type=click.IntRange(1), help="of images, pixels"),
            click.option(
                "--attention", default="heads", type=click.Choice(["heads", "dims", "none"]), show_default=True
            ),
            click.option("--debug", is_flag=True, help="show tracebacks"),
        )
    ):
        command = option(command)
    return command


@click.group(context_settings={"max_content_width": 120})
@click.version_option(package_name="tp-importance")
def main() -> None:
    """Prune networks to a budget that is met exactly, and restore them without training."""


@main.command()
@of_network
def inspect(
    name: str, weights: Path | None, pretrained: bool, classes: int | None, size: int, attention: str, debug: bool
) -> None:
    """List the groups of coupled channels, what is left alone and why, and the least cost within reach."""
    with_message(debug, lambda: show(*loaded(name, weights, pretrained, classes, size), attention))


@main.command()
@of_network
@click.option("--data", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path), help="images")
@click.option("--macs", type=number, help="limit: 0.5 of the network's, or a count")
@click.option("--params", type=number, help="limit: 0.5 of the network's, or a count")
@click.option("--latency", type=float, help="limit: 0.5 of the network's, predicted for this machine")
@click.option("--method", default="obs", show_default=True, type=click.Choice(sorted(METHODS)))
@click.option("--refit", default="sequential", show_default=True, type=click.Choice(REFITS))
@click.option("--recover", type=minutes, help="learn from the dense network: 3min, 90s, or yes")
@click.option("--samples", default=512, show_default=True, type=click.IntRange(1), help="images to look at")
@click.option("--batch-size", default=32, show_default=True, type=click.IntRange(1))
@click.option("--round-to", default=1, show_default=True, type=click.IntRange(1), help="widths are multiples of it")
@click.option("--mean", nargs=3, type=float, default=IMAGENET[0], show_default=True, help="of the images")
@click.option("--std", nargs=3, type=float, default=IMAGENET[1], show_default=True, help="of the images")
@click.option("--device", default="cpu", show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="file for load_pruned")
@click.option("--onnx", type=click.Path(dir_okay=False, path_type=Path), help="and an ONNX file, tried in onnxruntime")
def prune(debug: bool, **given: Any) -> None:
    """Prune a network by a folder of images, and save it."""
    with_message(debug, lambda: pruned(**given))


def pruned(
    name: str,
    weights: Path | None,
    pretrained: bool,
    classes: int | None,
    size: int,
    attention: str,
    data: Path,
    macs: float | int | None,
    params: float | int | None,
    latency: float | None,
    method: str,
    refit: str,
    recover: Recovery | None,
    samples: int,
    batch_size: int,
    round_to: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    device: str,
    seed: int,
    out: Path,
    onnx: Path | None,
) -> None:
    """What ``prune`` does."""
    if macs is None and params is None and latency is None:
        raise click.UsageError("give --macs, --params or --latency")
    budget = Budget(macs=macs, params=params, latency=latency)
    torch.manual_seed(seed)
    model, x = loaded(name, weights, pretrained, classes, size)
    model, x = model.to(device), x.to(device)
    loader = ImageFolder(data, count=samples, batch_size=batch_size, size=size, mean=mean, std=std, seed=seed)
    click.echo(f"{len(loader.paths)} images, {len(loader.classes) or 'no'} classes")
    result = prune_network(
        model,
        x,
        loader,
        budget=budget,
        method=method,
        refit=None if refit == "none" else refit,
        recover=recover,
        samples=None,
        attention=attention,
        round_to=round_to,
    )
    click.echo(str(result))
    save_pruned(model, out)
    click.echo(f"saved: {out}; load it by load_pruned(FACTORY, {str(out)!r})")
    if onnx is not None:
        export_onnx(model, x, onnx)
        click.echo(f"exported, same outputs in onnxruntime: {onnx}")


def loaded(
    name: str, weights: Path | None, pretrained: bool, classes: int | None, size: int
) -> tuple[nn.Module, Tensor]:
    """The network in eval mode, and two images of noise."""
    model = network(name, pretrained=pretrained, classes=classes)
    if weights is not None:
        load_weights(model, weights)
    return model.eval(), torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0), device="cpu")


def show(model: nn.Module, x: Tensor, attention: Any) -> None:
    """What ``inspect`` prints."""
    target = PruningTarget(model, x, attention=attention)
    click.echo(str(target.groups))
    cost = target.cost_model
    least = cost.cost(cost.widths(target.space.floor))
    share = least.macs / max(target.dense.macs, 1)
    click.echo(f"\ncost: {target.dense}\nleast within reach: {least}, {share:.1%} of the MACs, one unit in every group")


def with_message(debug: bool, work: Callable[[], None]) -> None:
    """Run, and end with a message and status 1 where the Python interface raises."""
    if not LOGGER.handlers and not sys.stderr.isatty():  # no bars there: say what is done, once it is
        logging.basicConfig(format="%(message)s", level=logging.WARNING)
        LOGGER.setLevel(logging.INFO)
    try:
        work()
    except click.ClickException:
        raise
    except (ValueError, TypeError, RuntimeError, OSError, ImportError) as error:
        if debug:
            raise
        notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", ()))
        raise click.ClickException(f"{error}{notes}") from error
