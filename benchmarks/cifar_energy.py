"""What losses of a reader are taken relative to: its own output or the residual sum, and to which power.

One shot on CIFAR-10 with the protocol of ``cifar_compensation.py``; draws 3 to 5 by default, which chose nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from cifar import BLOCKS, Cifar10
from cifar_oneshot import Network
from common import Cells, add_data_arguments, environment, flat, markdown, parser, read_results

from tp_importance import Budget, BudgetPruner, CATROImportance, OBSImportance
from tp_importance.readers import ReaderStatistics

MEASURES = {"sum": 1.0, "sum, ¾": 0.75, "output": 1.0, "output, ¾": 0.75}
"""What losses are relative to, and the exponent; ``"sum"`` is the library's."""
METHODS = {"CATRO": CATROImportance, "OBS": OBSImportance}


@contextmanager
def relative_to(measure: str) -> Iterator[None]:
    """Take losses relative to something of :data:`MEASURES`."""
    exponent = MEASURES[measure]
    with mock.patch.object(ReaderStatistics, "relative", lambda self, name: self.energy(name) ** -exponent):
        if measure.startswith("sum"):
            yield
        else:
            with mock.patch.object(ReaderStatistics, "sums", lambda self, forward_fn=None: nullcontext()):
                yield


def run(net: Network, method: str, mode: str, measure: str, draw: int, args: Any, data: Cifar10) -> dict[str, Any]:
    """One cell of the table."""
    model = net.fresh()
    batches = [(x.to(args.device), y.to(args.device)) for x, y in data.draw(draw, args.images)]
    pruner = BudgetPruner(
        model,
        net.inputs,
        batches,
        importance=METHODS[method](),
        budget=Budget(macs=args.macs),
        ignored_layers=[model.get_submodule(n) for n in net.ignored],
        verify=False,  # done once in Network
    )
    with relative_to(measure):
        report = pruner.step(compensate=None if mode == "none" else mode, recalibrate=True)
    return {"top1": round(data.accuracy(model, args.n_test, args.device), 3), "macs": report.cost.macs}


def table(results: dict[str, Any]) -> str:
    """Mean ± standard deviation over draws."""
    cells = [flat(c) for c in results["cells"]]
    rows = []
    for key in dict.fromkeys((c["network"], c["method"], c["mode"]) for c in cells):
        row = [*key]
        for measure in MEASURES:
            mine = [c for c in cells if (c["network"], c["method"], c["mode"]) == key and c["measure"] == measure]
            top1 = [c["top1"] for c in mine]
            spread = f" ± {np.std(top1, ddof=1):.1f}" if len(top1) > 1 else ""
            row.append(f"{np.mean(top1):.1f}{spread}" if top1 else "")
        rows.append(row)
    return markdown(["network", "criterion", "refit", *MEASURES], rows)


def main() -> None:
    p = parser(__doc__, "cifar_energy.json")
    add_data_arguments(p)
    p.add_argument("--networks", nargs="+", choices=BLOCKS, default=["resnet20", "resnet56"])
    p.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    p.add_argument("--modes", nargs="+", choices=["none", "parallel", "sequential"], default=["none", "sequential"])
    p.add_argument("--measures", nargs="+", choices=MEASURES, default=list(MEASURES))
    p.add_argument("--draws", type=int, nargs="+", default=[3, 4, 5])
    p.add_argument("--images", type=int, default=500)
    p.add_argument("--macs", type=float, default=0.5)
    p.add_argument("--n-test", type=int, default=5_000)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = p.parse_args()
    if not args.table:
        torch.set_num_threads(args.threads)
        data = Cifar10.load(args.data_root, args.npz)
        settings = {"macs": args.macs, "images": args.images, "n_test": args.n_test}
        cells = Cells(args.out, settings, environment(args.device, args.date))
        for name in args.networks:
            net = Network(args.data_root, name, args.device)
            for draw in args.draws:
                for method in args.methods:
                    for mode in args.modes:
                        for measure in args.measures:
                            key = {"network": name, "method": method, "mode": mode, "measure": measure, "draw": draw}
                            cells.fill(key, partial(run, net, method, mode, measure, draw, args, data))
    print(table(read_results(args.out)))


if __name__ == "__main__":
    main()
