"""PSAP: prune while training, by the sparsity of the weights (arXiv 2303.11881); its criterion in one shot, too."""

from ...pruning.domains import Choice, Float, Int
from ...pruning.registry import Job, register_method
from .history import PSAPHistory
from .importance import PSAPImportance
from .pruner import PSAPPruner
from .schedule import PSAPSchedule

__all__ = ["PSAPHistory", "PSAPImportance", "PSAPPruner", "PSAPSchedule"]


def _prune_while_training(job: Job) -> None:
    """PSAP as it is meant: masks move while the network trains."""
    if job.train is None:
        raise ValueError("method 'psap_training' prunes while training: pass train=, or choose 'psap'")
    options, budget = dict(job.options), job.whole_budget("psap_training")
    schedule = PSAPSchedule(**{k: options.pop(k) for k in ("prune_steps", "begin", "end", "pulse") if k in options})
    pruner = PSAPPruner(job.model, job.example_inputs, budget=budget, schedule=schedule, **options, **job.arguments)
    job.train(job.model, start=pruner.start, step=pruner.step)
    pruner.finish()  # removes what was masked while the batch norms learned: they fit
    job.recover()


register_method("psap", PSAPImportance, options={"ratio": Float(0.2, 0.8)})
register_method(
    "psap_training",
    prune=_prune_while_training,
    options={"threshold": Float(0.1, 1.0, log=True), "prune_steps": Int(2, 10), "protect": Choice((True, False))},
    needs_training=True,
    instead="PSAPPruner",
)
