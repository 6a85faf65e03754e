"""CATRO: class-aware channel selection by trace ratio (arXiv 2110.10921)."""

from ...pruning.domains import Float
from ...pruning.registry import register_method
from .importance import CATROImportance
from .pruner import CATROPruner

__all__ = ["CATROImportance", "CATROPruner"]

register_method("catro", CATROImportance, options={"class_weight": Float(0.0, 1.0)})
