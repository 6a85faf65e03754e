"""The methods of :mod:`tp_importance` as pruners for NNI 3.0.

Importing this package needs NNI: ``pip install "tp-importance[nni]"``.
"""

from .base import ImportancePruner
from .catro import CATROPruner
from .itpruner import ITPruner
<<<<<<< HEAD
from .resconv import ResConvPruner
from .speedup import speedup

__all__ = ["CATROPruner", "ITPruner", "ImportancePruner", "ResConvPruner", "speedup"]
=======
from .psap import PSAPPruner
from .speedup import speedup

__all__ = ["CATROPruner", "ITPruner", "ImportancePruner", "PSAPPruner", "speedup"]
>>>>>>> 02adc48
