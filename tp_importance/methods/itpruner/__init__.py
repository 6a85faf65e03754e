"""ITPruner: widths from what layers share and a convex program (arXiv 2108.08532)."""

from ...pruning.domains import Float
from ...pruning.registry import register_method
from .importance import ITPrunerImportance
from .pruner import ITPruner

__all__ = ["ITPruner", "ITPrunerImportance"]

register_method("itpruner", ITPrunerImportance, options={"beta": Float(-10.0, 10.0)})
