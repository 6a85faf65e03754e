"""Networks of the zoo that no library has."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from benchmarks.zoo.entry import Network
from benchmarks.zoo.own import detection, images, sequences, several


def networks() -> Iterator[Network]:
    """All of them."""
    yield from chain(images.networks(), detection.networks(), sequences.networks(), several.networks())
