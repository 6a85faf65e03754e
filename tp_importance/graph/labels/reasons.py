"""Why channels are left alone."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["ExclusionKind", "Index", "Reason"]

Index = NDArray[np.int64]

ExclusionKind = Literal[
    "output", "ignored", "mixed", "pinned", "computed", "unread", "minimum", "training", "unverified"
]
"""Why a group is left alone:

* ``output``: it makes the network's output;
* ``ignored``: ``ignored_layers`` names one of its layers, and nothing else stands in the way;
* ``mixed``: its channels are normalised, attended or grouped together, so that none can go alone;
* ``pinned``: its channels meet padding, constants or the network's input, which stay as they are;
* ``computed``: a weight is computed from tensors that cannot lose the channels;
* ``unread``: no layer with weights reads it;
* ``minimum``: it is at its smallest width;
* ``training``: a layer reads it in training mode only;
* ``unverified``: the verifier has refused it, because removal is not masking, say.
"""

Reason = tuple[ExclusionKind, str]
"""The kind, and text for people."""
