"""Orthogonalization of matrices by Newton-Schulz iterations."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import numpy as np

from psmpi.backend import NumpyOps
from psmpi.layout import Matrix

# Coefficients of the quintic that takes singular values in (0, 1] to about [0.7, 1.2] in ITERATIONS (Jordan et al.
# 2024).
A, B, C = 3.4445, -4.7750, 2.0315
ITERATIONS = 5
# Added to the norm, so that a zero matrix stays zero.
TINY = 1e-7


class NewtonSchulz:
    """Newton-Schulz iterations, which bring the singular values of a matrix to about 1, with memory for `matrices`.

    work: all memory, arrays of `ops`: two of the largest matrix, and two of the largest square of a shorter side.
    """

    def __init__(self, matrices: Sequence[Matrix], dtype: np.dtype, ops: NumpyOps) -> None:
        self.ops = ops
        sizes = [(m.rows * m.columns, min(m.rows, m.columns) ** 2) for m in matrices]
        size, square = (max(sides, default=0) for sides in zip(*sizes, strict=True)) if sizes else (0, 0)
        self.work = tuple(ops.empty(n, dtype) for n in (size, size, square, square))

    def input(self, matrix: Matrix) -> np.ndarray:
        """Return the array (rows * columns,) that takes the elements of a matrix, and holds the result afterwards."""
        return self.work[0][: matrix.rows * matrix.columns]

    def __call__(self, matrix: Matrix) -> None:
        """Orthogonalize the matrix X in `input(matrix)`: iterate X = A X + (B S + C S^2) X, S = X X^T, from X / ||X||.

        A matrix with more rows than columns takes the products on the other side, with S = X^T X.
        """
        ops, wide = self.ops, matrix.rows <= matrix.columns
        shape, side = (matrix.rows, matrix.columns), min(matrix.rows, matrix.columns)
        x, moved = (array[: matrix.rows * matrix.columns] for array in self.work[:2])
        square, power = (array[: side * side] for array in self.work[2:])
        xs, movings = x.reshape(shape), moved.reshape(shape)
        squares, powers = square.reshape(side, side), power.reshape(side, side)
        left, right = (xs, xs.T) if wide else (xs.T, xs)
        ops.scale(x, 1 / (sqrt(ops.squared_norm(x)) + TINY))
        for _ in range(ITERATIONS):
            ops.matmul(left, right, squares)
            ops.matmul(squares, squares, powers)
            ops.combine(power, (C, power), (B, square))
            if wide:
                ops.matmul(powers, xs, movings)
            else:
                ops.matmul(xs, powers, movings)
            ops.combine(x, (A, x), (1.0, moved))
