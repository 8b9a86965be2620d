"""Many classes from few images: each of the first MNIST images is a class, and its samples are copies of the image.

A copy is rotated by up to 15 degrees, scaled by 0.9 to 1.1, shifted by up to 2 pixels, and has noise.

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
    """Return a random copy of each image, (n, 28, 28) uint8, by bilinear interpolation. images: (n, 28, 28), 0 to 1."""
    n = len(images)
    angle, size = np.deg2rad(rng.uniform(-15, 15, (n, 1, 1))), rng.uniform(0.9, 1.1, (n, 1, 1))
    down, right = (rng.uniform(-2, 2, (n, 1, 1)) for _ in range(2))
    i, j = np.mgrid[:28, :28] - 13.5
    cos, sin = np.cos(angle) / size, np.sin(angle) / size
    # Source coordinates of each pixel, in images with a border of 20 zeros.
    rows, columns = cos * i - sin * j + down + 33.5, sin * i + cos * j + right + 33.5
    top, left = rows.astype(int), columns.astype(int)
    padded, at = np.pad(images, ((0, 0), (20, 20), (20, 20))), np.arange(n)[:, None, None]
    interpolated = np.zeros((n, 28, 28))
    for a, row_weight in ((0, 1 - (rows - top)), (1, rows - top)):
        for b, column_weight in ((0, 1 - (columns - left)), (1, columns - left)):
            interpolated += row_weight * column_weight * padded[at, top + a, left + b]
    return np.clip(255 * interpolated + rng.normal(0, 12, interpolated.shape), 0, 255).astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--copies", type=int, default=102, help="for training, of each class; 10 more are for tests")
    options = parser.parse_args()
    rng, split = np.random.default_rng(0), open_split("mnist", options.data_dir, "train")
    images = fetch(split, np.arange(options.classes), np.dtype(np.float32)).T.reshape(-1, 28, 28)
    arrays = {}
    for suffix, count in (("", options.copies), ("_test", 10)):
        labels = np.concatenate([rng.permutation(options.classes) for _ in range(count)])
        pieces = np.array_split(labels, -(-len(labels) // PIECE))
        arrays |= {
            f"x{suffix}": np.concatenate([copies(images[y], rng) for y in pieces])[:, None],
            f"y{suffix}": labels,
        }
    np.savez(options.out, **arrays)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"{error}") from None
