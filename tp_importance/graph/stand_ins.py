"""What stands for channels that fill no layer, where Torch-Pruning wants a layer with a pruning function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch_pruning as tp
from torch import nn

from .groups import ChannelGroup

__all__ = ["Channels", "ChannelsPruner", "InBlocks"]


class Channels(nn.Module):
    """Stands for the channels of a group that are not all of any layer's; in the order Torch-Pruning ranks them in."""

    def __init__(self, group: ChannelGroup) -> None:
        super().__init__()
        self.group, self.width = group.name, group.width

    def extra_repr(self) -> str:
        """How many channels of which group."""
        return f"{self.width} of {self.group}"


class ChannelsPruner(tp.BasePruningFunc):
    """Nothing to cut in these."""

    def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> Any:
        """The same stand-in: the layers behind it are cut."""
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer: Any) -> int:
        """Present width of the group."""
        return int(layer.width)

    get_in_channels = get_out_channels


class InBlocks:
    """A pruning function that says how many blocks the channels of a layer are ranked in; else it is the one given."""

    def __init__(self, pruner: Any, blocks: int) -> None:
        self._pruner, self._blocks = pruner, blocks

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pruner, name)

    def get_in_channel_groups(self, layer: Any) -> int:
        """Inputs are ranked as they are."""
        return 1

    def get_out_channel_groups(self, layer: Any) -> int:
        """Blocks in which the outputs are ranked."""
        return self._blocks
