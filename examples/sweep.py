"""One look at the data, many budgets: ITPruner's widths from 90 % of the MACs down to 10 %, in a table and a picture.

    python examples/sweep.py            # the table, and outputs/sweep.png

The network and the data are those of the quick start. No accuracy here: this is what one sees before anything is cut.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from quickstart import build, digits, train

from tp_importance import Budget, ITPruner
from tp_importance.pruning.sweep import plot_sweep, sweep_frame


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5, help="training epochs of the dense network (default 5)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, default=Path("outputs/sweep.png"))
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    training, calibration, _ = digits(args.seed)
    model = build()
    train(model, training, args.epochs, 0.05, args.seed)

    pruner = ITPruner(model, calibration[0][0][:2], calibration, budget=Budget(macs=0.5))
    start = time.perf_counter()
    pruner.collect()
    collected = time.perf_counter()
    plans = pruner.sweep([f / 20 for f in range(18, 1, -1)])
    solved = time.perf_counter()
    print(f"statistics {1e3 * (collected - start):.0f} ms, {len(plans)} budgets {1e3 * (solved - collected):.0f} ms")

    frame = sweep_frame(plans)
    table = frame["width"].set_index((100 * frame["plan", "macs_fraction"]).round(1).rename("% MACs"))
    print(table.to_string())
    tightest = plans[-1].certificate
    print(
        f"\nat the last budget: KKT residual {tightest['kkt_residual']:.0e}, the objective of these widths is "
        f"{tightest['objective_units']:.2f}, and that of any others at least {tightest['bound']:.2f}"
    )
    args.plot.parent.mkdir(parents=True, exist_ok=True)
    plot_sweep(plans, args.plot)
    print(f"picture: {args.plot}")


if __name__ == "__main__":
    main()
