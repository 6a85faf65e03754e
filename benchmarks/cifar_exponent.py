"""How far to take losses relative to a group's energy: CATRO consumer under several exponents, one shot on CIFAR-10.

The protocol is that of ``cifar_oneshot.py``; draws 3 to 5 by default, which chose nothing before.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from cifar import BLOCKS, Cifar10
from cifar_oneshot import Network
from common import FOLLOWED, Cells, add_data_arguments, environment, flat, markdown, parser, read_results

from tp_importance import Budget, CATROPruner
from tp_importance.statistics import consumers

EXPONENTS = (1.0, 0.9, 0.8, 0.75, 0.7, 0.6, 0.5, 0.0)


def run(net: Network, exponent: float, draw: int, args: Any, data: Cifar10) -> dict[str, Any]:
    model = net.fresh()
    batches = [(x.to(args.device), y.to(args.device)) for x, y in data.draw(draw, args.images)]
    ignored = [model.get_submodule(n) for n in net.ignored]
    budget = Budget(macs=args.macs)
    before, consumers.ENERGY_EXPONENT = consumers.ENERGY_EXPONENT, exponent
    try:
        pruner = CATROPruner(model, net.inputs, batches, budget=budget, ignored_layers=ignored, verify=False)
        report = pruner.step(refit="batchnorm")
    finally:
        consumers.ENERGY_EXPONENT = before
    return {"top1": round(data.accuracy(model, args.n_test, args.device), 3), "macs": report.cost.macs}


def table(results: dict[str, Any]) -> str:
    """Mean ± standard deviation over draws."""
    cells = [flat(c) for c in results["cells"]]
    names = sorted({c["network"] for c in cells})
    rows = []
    for exponent in dict.fromkeys(c["exponent"] for c in cells):
        row = [str(exponent)]
        for name in names:
            top1 = [c["top1"] for c in cells if c["exponent"] == exponent and c["network"] == name]
            row.append(f"{np.mean(top1):.2f} ± {np.std(top1, ddof=1):.2f}" if len(top1) > 1 else "")
        rows.append(row)
    return markdown(["exponent", *names], rows)


def main() -> None:
    p = parser(__doc__, "cifar_exponent.json")
    add_data_arguments(p)
    p.add_argument("--networks", nargs="+", choices=BLOCKS, default=list(BLOCKS))
    p.add_argument("--draws", type=int, nargs="+", default=[3, 4, 5])
    p.add_argument("--images", type=int, default=500)
    p.add_argument("--macs", type=float, default=0.5)
    p.add_argument("--n-test", type=int, default=10_000)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = p.parse_args()
    if not args.table:
        torch.set_num_threads(args.threads)
        data = Cifar10.load(args.data_root, args.npz)
        settings = {"macs": args.macs, "images": args.images, "n_test": args.n_test}
        cells = Cells(args.out, settings | FOLLOWED, environment(args.device, args.date))
        for name in args.networks:
            net = Network(args.data_root, name, args.device)
            for exponent in EXPONENTS:
                for draw in args.draws:
                    key = {"network": name, "exponent": exponent, "draw": draw}
                    cells.fill(key, partial(run, net, exponent, draw, args, data))
    print(table(read_results(args.out)))


if __name__ == "__main__":
    main()
