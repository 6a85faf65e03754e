"""The methods of :mod:`tp_importance` as pruners for NNI 3.0.

Importing this package needs NNI: ``pip install "tp-importance[nni]"``.
"""

from .base import ImportancePruner
from .catro import CATROPruner
from .itpruner import ITPruner
from .psap import PSAPPruner
from .resconv import ResConvPruner
from .speedup import speedup

__all__ = ["CATROPruner", "ITPruner", "ImportancePruner", "PSAPPruner", "ResConvPruner", "speedup"]
