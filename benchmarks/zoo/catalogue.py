"""All networks of the zoo, by name.

>>> CATALOGUE["resnet18"].family
'torchvision'
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from itertools import chain

from benchmarks.zoo import own, timm_networks, torchvision_networks, transformers_networks, ultralytics_networks
from benchmarks.zoo.entry import Network

PARTS = (torchvision_networks, ultralytics_networks, timm_networks, transformers_networks, own)


def by_name(networks: Iterable[Network]) -> dict[str, Network]:
    found: dict[str, Network] = {}
    for network in networks:
        if network.name in found:
            raise ValueError(f"two networks of the zoo are called {network.name!r}")
        found[network.name] = network
    return found


CATALOGUE = by_name(chain.from_iterable(part.networks() for part in PARTS))


def chosen(patterns: str) -> list[Network]:
    """Networks whose name or family matches one of some patterns with commas between them; all, if there is none.

    Raises:
        SystemExit: for a pattern that matches nothing.
    """
    wanted = [p for p in patterns.split(",") if p]
    for p in wanted:
        if not any(fnmatchcase(n.name, p) or n.family == p for n in CATALOGUE.values()):
            raise SystemExit(f"no network or family of the zoo matches {p!r}; there are: {', '.join(CATALOGUE)}")
    return [n for n in CATALOGUE.values() if not wanted or any(fnmatchcase(n.name, p) or n.family == p for p in wanted)]
