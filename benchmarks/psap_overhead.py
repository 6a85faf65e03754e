"""What PSAP costs per training step: masked, and with the pulse on, as ratios to a bare step of the same network.

ResNet-20 on random 32×32 images. Rounds take one step of each in turn; ratios are taken within a round, then the
median. With one CPU thread the time is that of the process, so that other load on the machine hardly touches it. Prune
steps themselves (a few per training) are timed apart.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from cifar import network
from common import Cells, add_data_arguments, environment, flat, markdown, parser, read_results
from torch.nn import functional as F

from tp_importance import Budget, PSAPPruner, PSAPSchedule


def seconds(device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def stepper(kind: str, args: Any) -> Callable[[], None]:
    """One training step, bare or under PSAP; set up so that nothing is pruned any more while it is timed."""
    torch.manual_seed(0)
    model = network(args.data_root, args.network).to(args.device, memory_format=torch.channels_last)
    x = torch.randn(args.batch_size, 3, 32, 32).to(args.device, memory_format=torch.channels_last)
    y = (torch.arange(args.batch_size) % 10).to(args.device)
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, 0.9)
    after: Callable[[], None] = lambda: None  # noqa: E731
    if kind != "bare":
        long = 10_000
        # one prune step at once; then the pulse goes on for ever, or there is none
        schedule = PSAPSchedule(prune_steps=1, begin=1 / long, end=1 / long, pulse=long // 2 if kind == "pulse" else 0)
        pruner = PSAPPruner(model, x[:2], budget=Budget(macs=0.5), schedule=schedule)
        pruner.start(optimizer, total_steps=long)
        after = pruner.step
    model.train()

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        after()

    step()  # the prune step
    if kind != "bare":
        assert any(pruner.masked.values()) and pruner.frozen == (kind == "masked")
    return step


def measure(args: Any) -> dict[str, Any]:
    """Ratios of all kinds of step."""
    steps = {kind: stepper(kind, args) for kind in ("bare", "masked", "pulse")}
    spent: dict[str, list[float]] = {kind: [] for kind in steps}
    for round_ in range(args.rounds + 2):  # the first two warm up
        for kind, step in steps.items():
            start = seconds(args.device)
            step()
            if round_ > 1:
                spent[kind].append(seconds(args.device) - start)
    ratios = {k: [s / b for s, b in zip(spent[k], spent["bare"], strict=True)] for k in steps if k != "bare"}
    return {
        "bare_s": round(statistics.median(spent["bare"]), 4),
        "ratio": {k: round(statistics.median(r), 3) for k, r in ratios.items()},
        "quartiles": {k: [round(q, 3) for q in statistics.quantiles(r, n=4)[::2]] for k, r in ratios.items()},
        "prune_step_s": round(prune_step(args), 4),
    }


def prune_step(args: Any) -> float:
    """Time of one prune step: sparsities, widths, masks."""
    model = network(args.data_root, args.network).to(args.device)
    x = torch.randn(2, 3, 32, 32, device=args.device)
    schedule = PSAPSchedule(prune_steps=5, begin=0, end=1, pulse=0)
    pruner = PSAPPruner(model, x, budget=Budget(macs=0.5), schedule=schedule)
    pruner.start(torch.optim.SGD(model.parameters(), 0.1), total_steps=5)
    found = []
    for _ in range(5):
        start = seconds(args.device)
        pruner.step()
        found.append(seconds(args.device) - start)
    return statistics.median(found)


def table(results: dict[str, Any]) -> str:
    rows = []
    for cell in map(flat, results["cells"]):
        for kind, ratio in cell["ratio"].items():
            low, high = cell["quartiles"][kind]
            rows.append(
                [
                    *(cell[k] for k in ("network", "batch", "device", "bare_s")),
                    kind,
                    f"{ratio:.3f}",
                    f"{low:.3f} to {high:.3f}",
                    cell["prune_step_s"],
                ]
            )
    header = ["network", "batch", "device", "bare step, s", "step", "time / bare step", "quartiles", "prune step, s"]
    return markdown(header, rows)


def main() -> None:
    p = parser(__doc__, "psap_overhead.json")
    add_data_arguments(p)
    p.set_defaults(threads=1)
    p.add_argument("--network", default="resnet20")
    p.add_argument("--batch-size", type=int, default=128)
    p.add_argument("--rounds", type=int, default=30)
    p.add_argument("--device", default="cpu")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    if not args.table:
        cells = Cells(args.out, {"rounds": args.rounds}, environment(args.device, args.date))
        key = {"network": args.network, "batch": args.batch_size, "device": args.device, "threads": args.threads}
        cells.fill(key, partial(measure, args))
    print(table(read_results(args.out)))


if __name__ == "__main__":
    main()
