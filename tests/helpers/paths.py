"""Where things lie."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""Of the repository."""

DATA = Path(os.environ.get("TP_IMPORTANCE_DATA", ROOT.parent / "shared" / "data"))
"""CIFAR-10 and pretrained weights, where there are any; what needs them is skipped otherwise."""
