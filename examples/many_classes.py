"""Many classes from few images: each of the first MNIST images is a class, samples are copies of it.

A copy is turned by up to 15 degrees, made 0.9 to 1.1 times as large, shifted by up to 2 pixels, and has noise.

    python examples/many_classes.py many.npz --data-dir data                # half a minute, 90 MB
    python -m psmpi.train --dataset many.npz --model head --loss nll --scale 16 --batch-size 256 --epochs 5
"""

import argparse

import numpy as np

from psmpi.data import open_split
from psmpi.errors import UserError
from psmpi.training.predictor import fetch

PIECE = 1000


def copies(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A copy (n, 28, 28) uint8 of each of images (n, 28, 28), 0 to 1, by bilinear interpolation."""
    n = len(images)
    angle, size = np.deg2rad(rng.uniform(-15, 15, (n, 1, 1))), rng.uniform(0.9, 1.1, (n, 1, 1))
    down, right = (rng.uniform(-2, 2, (n, 1, 1)) for _ in range(2))
    i, j = np.mgrid[:28, :28] - 13.5
    cos, sin = np.cos(angle) / size, np.sin(angle) / size
    # Where each pixel comes from, in images with a border of zeros wide enough.
    rows, columns = cos * i - sin * j + down + 33.5, sin * i + cos * j + right + 33.5
    top, left = rows.astype(int), columns.astype(int)
    wide, at = np.pad(images, ((0, 0), (20, 20), (20, 20))), np.arange(n)[:, None, None]
    found = np.zeros((n, 28, 28))
    for a, more in ((0, 1 - (rows - top)), (1, rows - top)):
        for b, weight in ((0, 1 - (columns - left)), (1, columns - left)):
            found += more * weight * wide[at, top + a, left + b]
    return np.clip(255 * found + rng.normal(0, 12, found.shape), 0, 255).astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--copies", type=int, default=102, help="for training, of each class; 10 more are for tests")
    given = parser.parse_args()
    rng, split = np.random.default_rng(0), open_split("mnist", given.data_dir, "train")
    images = fetch(split, np.arange(given.classes), np.dtype(np.float32)).T.reshape(-1, 28, 28)
    arrays = {}
    for end, count in (("", given.copies), ("_test", 10)):
        labels = np.concatenate([rng.permutation(given.classes) for _ in range(count)])
        pieces = np.array_split(labels, -(-len(labels) // PIECE))
        arrays |= {f"x{end}": np.concatenate([copies(images[y], rng) for y in pieces])[:, None], f"y{end}": labels}
    np.savez(given.out, **arrays)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"{error}") from None
