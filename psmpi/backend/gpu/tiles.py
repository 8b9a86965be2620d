"""The last layer of very many classes on a GPU, tile by tile."""

from __future__ import annotations

from typing import Any

from psmpi.backend.gpu.device import Device


def _rows(weights: Any, biases: Any) -> tuple[Any, int, Any, int]:
    """Weights (classes, inputs), biases (classes,) or None, and the elements from one to the next, as kernels take it.

    Without biases their array is 0.
    """
    row = weights.strides[0] // weights.itemsize
    return weights, row, *((0, 0) if biases is None else (biases, biases.strides[0] // biases.itemsize))


class DeviceTiles(Device):
    """Kernels of tiles.cu, where reports, and how derivatives are scaled, are explained."""

    def head_labels(self, features: Any, labels: Any, weights: Any, biases: Any, out: Any) -> None:
        """out (1, b) float64: scores of labels, from features (inputs, b); 0 of labels that are not among the rows."""
        shape = (len(weights), *features.shape)
        self.spread("head_labels", features.dtype, len(labels), *shape, features, labels, *_rows(weights, biases), out)

    def next_tile(
        self, scores: Any, stop: int, labels: Any, before: Any, rest: Any, report: Any, rests: Any, own: Any
    ) -> None:
        """Add what a tile has found to what those before have: its report (4,), and rest (b,) or None into rests.

        before: the report of those before, None of the first. own (b,): the labels, counted from class `stop`.
        """
        before, rest, rests = (0 if array is None else array for array in (before, rest, rests))
        arrays = labels, before, rest, report, rests, own
        self.spread("next_tile", scores.dtype, len(labels), stop, len(labels), *arrays)

    def add_part(self, part: Any, before: Any, report: Any, out: Any) -> None:
        """out += part, where out is a sum of tiles up to the one of the report `before`."""
        self.spread("add_part", out.dtype, out.size, out.size, part, before, report, out)

    def close_head(
        self, features: Any, labels: Any, rest: Any, reports: Any, tile: int, weights: Any, biases: Any, report: Any
    ) -> None:
        """Complete the gradients of rows, weights (classes, inputs) and biases (classes,) or None, and report (4,).

        rest: (b,) the sums of terms over all classes, or None of a loss without; reports: (tiles, 4) those of tiles of
        `tile` classes.
        """
        dtype, classes, (inputs, b) = features.dtype, len(weights), features.shape
        rows, size = _rows(weights, biases), classes * (inputs + 1)
        self.launch("head_report", dtype, (1,), (256,), classes, b, labels, 0 if rest is None else rest, reports[-1],
                    report)  # fmt: skip
        self.spread("scale_rows", dtype, size, size, inputs, tile, reports, report, *rows)
        if rest is not None:
            shape = classes, inputs, b
            self.launch("close_rows", dtype, (b,), (256,), *shape, features, labels, rest, report, *rows)

    def close_features(self, labels: Any, rest: Any, weights: Any, last: Any, report: Any, out: Any) -> None:
        """Complete the gradient of the features, out (inputs, b), by rest (b,) and the rows of labels.

        last: the report of the last tile; report: that of `close_head`.
        """
        arrays = labels, rest, *_rows(weights, None)[:2], last, report, out
        self.spread("close_features", out.dtype, out.size, len(weights), *out.shape, *arrays)
