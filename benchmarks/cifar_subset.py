"""Pack what the CIFAR benchmarks need into a small folder, for machines the whole data set cannot travel to.

python benchmarks/cifar_subset.py data/cifar      # 35 MB of images, 4 MB of weights
python benchmarks/cifar_oneshot.py --data-root data/cifar --npz data/cifar/cifar10-subset.npz
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np
from cifar import Cifar10
from common import DATA_ROOT, require

LIMIT = 45_000_000


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=Path, help="a folder that git ignores: the data must not be committed")
    p.add_argument("--data-root", type=Path, default=DATA_ROOT)
    p.add_argument("--draws", type=int, default=3)
    p.add_argument("--images", type=int, default=500, help="training images per draw")
    p.add_argument("--networks", nargs="+", default=["resnet20", "resnet56"])
    args = p.parse_args()
    data = Cifar10.load(args.data_root)
    draws = [data.images(seed, args.images) for seed in range(args.draws)]
    (args.folder / "weights").mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        args.folder / "cifar10-subset.npz",
        x_test=data.x_test,
        y_test=data.y_test.astype(np.uint8),
        x_draws=np.stack([x for x, _ in draws]),
        y_draws=np.stack([y for _, y in draws]).astype(np.uint8),
    )
    shutil.copyfile(
        require(args.data_root / "cifar_resnet.py", "the network definition"), args.folder / "cifar_resnet.py"
    )
    for name in args.networks:
        for path in (args.data_root / "weights").glob(f"{name}-*.th"):
            shutil.copyfile(path, args.folder / "weights" / path.name)
    size = sum(f.stat().st_size for f in args.folder.rglob("*") if f.is_file())
    print(f"{args.folder}: {size / 1e6:.1f} MB")
    if size > LIMIT:
        raise SystemExit(f"that is more than {LIMIT / 1e6:.0f} MB: take fewer draws or networks")


if __name__ == "__main__":
    main()
