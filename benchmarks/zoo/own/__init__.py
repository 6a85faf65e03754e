"""Networks of the zoo that no library has."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from benchmarks.zoo.entry import Network
from benchmarks.zoo.own import detection, diffusion, images, sequences, several, transformers


def networks() -> Iterator[Network]:
    """All of them."""
    yield from chain.from_iterable(
        part.networks() for part in (images, diffusion, detection, sequences, several, transformers)
    )
