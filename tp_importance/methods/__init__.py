"""One folder per method: importance, mathematics, pruner, and one registration; importing this registers them all."""

from . import catro, hosts, itpruner, obs, psap, resconv

__all__ = ["catro", "hosts", "itpruner", "obs", "psap", "resconv"]
