"""Generated tasks: sequences that need memory, modular addition, and the tasks of psmpi.data.planted."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt

from psmpi.data.planted import ratings, sparse
from psmpi.data.rows import ArrayRows
from psmpi.data.split import Dataset, Split, frozen
from psmpi.errors import UserError

SAMPLES, TESTS = 10_000, 1_000
# Key of these random numbers, which separates them from others drawn from the same seed.
_TAG = 0x7461736B
# Number of symbols of copying, and length of the copied sequence; number of symbols of repeat_copy, most repetitions.
COPIED, RECALLED = 8, 10
LETTERS, REPEATS = 4, 3

Arrays = tuple[npt.NDArray[np.float32], npt.NDArray[np.generic], npt.NDArray[np.int32] | None]


def adding(n: int, steps: int, rng: np.random.Generator) -> Arrays:
    """The adding problem: numbers from U(0, 1), two of them marked, one in each half; the value is the sum of the two.

    Hochreiter and Schmidhuber (1997). x: (n, 2, steps) float32; values: (n, 1) float64. The RMSE of predicting the mean
    is sqrt(1 / 6) = 0.408.
    """
    x = np.zeros((n, 2, steps), np.float32)
    x[:, 0] = rng.random((n, steps), np.float32)
    half = steps // 2
    for first, stop in ((0, half), (half, steps)):
        x[np.arange(n), 1, rng.integers(first, stop, n)] = 1
    return x, (x[:, 0] * x[:, 1]).sum(axis=1, dtype=np.float64)[:, None], None


def copying(n: int, blanks: int, rng: np.random.Generator) -> Arrays:
    """The copying problem: ten symbols, `blanks` blank steps, a signal, then the network has to repeat the symbols.

    Hochreiter and Schmidhuber (1997), in the form of Arjovsky et al. (2016), except that only the ten answers count.
    x: (n, 10, blanks + 20) float32, one-hot of blank, eight symbols and signal; labels: (n, steps), -1 before answers.
    """
    steps = blanks + 2 * RECALLED
    symbols = rng.integers(0, COPIED, (n, RECALLED))
    inputs = np.zeros((n, steps), np.int64)
    inputs[:, :RECALLED] = 1 + symbols
    inputs[:, steps - RECALLED - 1] = COPIED + 1
    labels = np.full((n, steps), -1)
    labels[:, -RECALLED:] = symbols
    return _one_hot(inputs, COPIED + 2), labels, None


def repeat_copy(n: int, longest: int, rng: np.random.Generator) -> Arrays:
    """Repeat copy: 1 to `longest` letters, then a number from 1 to 3; the network repeats the letters that many times.

    Graves et al. (2014), with letters instead of vectors of bits. x: (n, 5, 4 longest + 2) float32, one-hot of four
    letters, and a third of the number; labels: (n, steps) of four letters and an end mark, after the number, else -1.
    """
    steps = (1 + REPEATS) * longest + 2
    x, labels = np.zeros((n, LETTERS + 1, steps), np.float32), np.full((n, steps), -1)
    lengths = np.zeros(n, np.int32)
    sizes, times = rng.integers(1, longest + 1, n), rng.integers(1, REPEATS + 1, n)
    letters = rng.integers(0, LETTERS, (n, longest))
    for k, (size, count) in enumerate(zip(sizes.tolist(), times.tolist(), strict=True)):
        word = letters[k, :size]
        x[k, word, np.arange(size)] = 1
        x[k, LETTERS, size] = count / REPEATS
        labels[k, size + 1 : size + 1 + count * size] = np.tile(word, count)
        labels[k, size + 1 + count * size] = LETTERS
        lengths[k] = size + 2 + count * size
    return x, labels, lengths


def modular_addition(modulus: int, seed: int) -> tuple[Split, Split]:
    """Modular addition: tokens a, b and = of all pairs below N = `modulus`, in random order; labels (a + b) mod N.

    Power et al., arXiv 2201.02177. Half of the pairs are for training, the others for testing. x: (n, 1, 3) int16,
    tokens 0 to N - 1, and N for =; labels: (n,).
    """
    sequence = np.random.SeedSequence([max(seed, 0), _TAG, 2])
    order = np.random.Generator(np.random.Philox(sequence)).permutation(modulus**2)
    a, b = np.divmod(order, modulus)
    x = np.stack([a, b, np.full(len(order), modulus)], axis=1).astype(np.int16)
    half = -(-len(order) // 2)
    train, test = (
        Split(frozen((a + b)[at] % modulus), (1, 3), 1.0, ArrayRows(x[at]), vocabulary=modulus + 1)
        for at in (slice(half), slice(half, None))
    )
    return train, test


def _one_hot(numbers: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.float32]:
    """One-hot encoding of numbers (n, steps) below `count`: (n, count, steps)."""
    return np.ascontiguousarray((numbers[:, None] == np.arange(count)[:, None]).astype(np.float32))


def _drawn(make: Callable[[int, int, np.random.Generator], Arrays], size: int, seed: int) -> tuple[Split, Split]:
    """Make SAMPLES training and TESTS test sequences."""
    splits = []
    for k, n in enumerate((SAMPLES, TESTS)):
        sequence = np.random.SeedSequence([max(seed, 0), _TAG, k])
        x, targets, lengths = make(n, size, np.random.Generator(np.random.Philox(sequence)))
        splits.append(Split(frozen(targets), x.shape[1:], 1.0, ArrayRows(x.reshape(n, -1)), None, lengths))
    return splits[0], splits[1]


# Tasks by name: function, default size, smallest and largest size.
TASKS: dict[str, tuple[Callable[[int, int], tuple[Split, Split]], int, int, int]] = {
    "adding": (partial(_drawn, adding), 50, 2, 5000),
    "copying": (partial(_drawn, copying), 20, 1, 5000),
    "repeat_copy": (partial(_drawn, repeat_copy), 5, 1, 500),
    "modular_addition": (modular_addition, 97, 5, 1000),
    "sparse": (sparse, 2000, 50, 10_000_000),
    "ratings": (ratings, 1000, 200, 500_000),
}


def open_task(task: str, number: str, seed: int) -> Dataset:
    """Make the data set of a task; equal seeds make equal data sets.

    number: the size of the task, which is its steps, blanks, letters, modulus, features or rows; "": the default.
    UserError for a size out of the task's range.
    """
    make, size, least, most = TASKS[task]
    if number:
        if not (number.isascii() and number.isdigit() and least <= int(number) <= most):
            raise UserError(
                f"--dataset {task}:{number}: expected {task}:N with N from {least} to {most}, or {task} alone"
            )
        size = int(number)
    train, test = make(size, seed)
    outputs = train.targets.shape[-1] if train.task == "regression" else int(train.targets.max()) + 1
    return Dataset(task if not number else f"{task}:{number}", outputs, train.shape, train, test)
