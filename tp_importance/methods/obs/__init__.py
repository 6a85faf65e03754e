"""Structured optimal brain surgeon: channels by the loss that is left after their consumers are refitted."""

from ...pruning.domains import Float
from ...pruning.registry import register_method
from .importance import OBSImportance
from .pruner import OBSPruner

__all__ = ["OBSImportance", "OBSPruner"]

register_method("obs", OBSImportance, options={"class_weight": Float(0.0, 1.0)})
