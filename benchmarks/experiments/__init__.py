"""The experiments; a module holds those that have their cells in common."""

MODULES: dict[str, tuple[str, ...]] = {
    "one_shot": ("cifar", "exponent"),
    "refit": ("refit", "refit-50", "refit-50-ridge", "default-widths"),
    "rivals": ("rivals",),
    "padded_shortcuts": ("option-a",),
    "batchnorm": ("batchnorm", "batchnorm-500"),
    "subtask": ("subtask", "imagenette", "imagenette-250", "imagenette-500"),
    "itpruner": ("itpruner",),
    "recovery": ("recovery",),
    "recover": ("recover", "recover-settings", "recover-curve"),
    "long_runs": ("long", "headline"),
    "psap": ("psap", "psap-cifar", "psap-overhead"),
    "resconv": ("resconv", "resconv-latency"),
    "automl": ("automl", "automl-pareto"),
    "scoring": ("scoring", "scoring-2threads", "one-shot-cost"),
    "speed": ("speed", "scaling", "large"),
    "ordering": ("ordering", "ridge"),
    "itpruner_cost": ("itpruner-cost",),
    "latency": ("latency",),
    "sentence_encoder": ("sentence-encoder", "sentence-encoder-latency"),
    "vit": ("vit", "vit-training"),
    "zoo": ("zoo",),
    "random_graphs": ("random-graphs",),
    "masked_removed": ("masked-removed",),
    "host_tests": ("host-tests",),
}
"""Names of the experiments of each module."""
