"""The one command of all benchmarks.

python benchmarks/run.py                        # list the experiments
python benchmarks/run.py cifar --help           # what can be chosen, and the defaults
python benchmarks/run.py cifar --networks resnet20 --arms "CATRO, greedy" --draws 0 --out outputs/mine.jsonl
python benchmarks/run.py cifar --table          # print the tables of its results
python benchmarks/run.py --fill                 # fill the tables of README.md and docs/
python benchmarks/run.py --figures              # draw the pictures of docs/pictures/
python benchmarks/run.py subset FOLDER          # pack what the CIFAR benchmarks need into a small folder
python benchmarks/run.py train --network resnet14-conv   # train what has no pretrained weights
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks import experiment, prepare, tables  # noqa: E402


def main(arguments: list[str]) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)  # of NNI 3.0, about torch
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        for name in experiment.experiments():
            print(f"  {name:18} {experiment.find(name).about}")
    elif arguments == ["--fill"]:
        print("filled:", ", ".join(tables.fill(experiment.table)) or "nothing was out of date")
    elif arguments == ["--figures"]:
        from benchmarks import figures  # with matplotlib, which nothing else needs

        print("drawn:", ", ".join(str(path) for path in figures.draw()))
    elif arguments[0] in prepare.COMMANDS:
        prepare.COMMANDS[arguments[0]](arguments[1:])
    else:
        experiment.find(arguments[0]).main(arguments[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
