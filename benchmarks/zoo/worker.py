"""The process that examines one network: ``python -m benchmarks.zoo.worker``, with a line of JSON on its input.

Every part that ends gives one line of JSON, ``{"part": name, "values": {...}}``; the first line, ``{"part": "ready"}``,
says that the network has been built. Whatever else is printed goes to the standard error. Once its standard input is
closed nobody waits for it any more, and it ends.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from threading import Thread
from typing import Any

import torch


def main() -> None:
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.filterwarnings("ignore")
    order = json.loads(sys.stdin.readline())
    Thread(target=_end_with_the_parent, daemon=True).start()
    torch.set_num_threads(order["threads"])

    def say(part: str, values: dict[str, Any]) -> None:
        print(json.dumps({"part": part, "values": values}), file=lines, flush=True)

    from benchmarks.zoo.catalogue import CATALOGUE
    from benchmarks.zoo.host import said
    from benchmarks.zoo.parts import PARTS, Examination

    try:
        exam = Examination(CATALOGUE[order["network"]], order["known"], order["repeats"])
    except ImportError as error:
        say("ready", {"missing": said(error)})
        return
    say("ready", {})
    for part in order["parts"]:
        try:
            values = PARTS[part](exam)
        except Exception as error:  # a part that fails must not take the others with it
            values = {"error": said(error)}
        exam.known[part] = values
        say(part, values)


def _end_with_the_parent() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    main()
