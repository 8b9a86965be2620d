"""The last layer of very many classes on a GPU, tile by tile."""

from __future__ import annotations

from typing import Any

from psmpi.backend.gpu.device import Device


def _rows(weights: Any, biases: Any) -> tuple[Any, int, Any, int]:
    """The arguments of a kernel for weights (classes, inputs) and biases (classes,) or None.

    These are each array and its stride in elements between classes; 0 and 0 without biases.
    """
    row = weights.strides[0] // weights.itemsize
    return weights, row, *((0, 0) if biases is None else (biases, biases.strides[0] // biases.itemsize))


class DeviceTiles(Device):
    """Operations by the kernels of cuda/tiles.cu, which explains reports and the scaling of derivatives."""

    def head_labels(self, features: Any, labels: Any, weights: Any, biases: Any, out: Any) -> None:
        """out (1, b) float64 = the labels' scores, from features (inputs, b); 0 for labels outside the rows."""
        shape = (len(weights), *features.shape)
        self.spread("head_labels", features.dtype, len(labels), *shape, features, labels, *_rows(weights, biases), out)

    def next_tile(
        self, scores: Any, stop: int, labels: Any, before: Any, rest: Any, report: Any, rests: Any, own: Any
    ) -> None:
        """Combine the results of a tile with those of the tiles before it.

        report: (4,), of this tile, becomes that of all tiles so far. before: report of the tiles before, None for the
        first tile. rest: (b,) sums of terms of this tile, added to rests, or None. own: (b,), filled with the labels
        counted from class `stop`.
        """
        before, rest, rests = (0 if array is None else array for array in (before, rest, rests))
        arrays = labels, before, rest, report, rests, own
        self.spread("next_tile", scores.dtype, len(labels), stop, len(labels), *arrays)

    def add_part(self, part: Any, before: Any, report: Any, out: Any) -> None:
        """Add the part of a tile to out, the sum of the parts of earlier tiles.

        out is scaled as the report `before` states and part as `report` states: out is rescaled to `report` first.
        """
        self.spread("add_part", out.dtype, out.size, out.size, part, before, report, out)

    def close_head(
        self, features: Any, labels: Any, rest: Any, reports: Any, tile: int, weights: Any, biases: Any, report: Any
    ) -> None:
        """Complete the gradients of weights (classes, inputs) and biases (classes,) or None, and fill report (4,).

        rest: (b,) sums of terms over all classes, or None for losses without them. reports: (tiles, 4), one for each
        tile of `tile` classes.
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
        """Complete out (inputs, b), the gradient of the features, with rest (b,) and the labels' rows of weights.

        last: report of the last tile. report: the report of `close_head`.
        """
        arrays = labels, rest, *_rows(weights, None)[:2], last, report, out
        self.spread("close_features", out.dtype, out.size, len(weights), *out.shape, *arrays)
