"""Losses on a GPU, and scaling of derivatives by a power of two, which keeps a backward pass finite."""

from __future__ import annotations

from typing import Any

import numpy as np

from psmpi.backend.gpu.device import Device
from psmpi.backend.gpu.grids import BLOCKS, blocks

LOSSES = {"psl": 0, "logistic": 1, "nll": 2, "squared": 3, "bce": 4}


class DeviceLosses(Device):
    """Losses by the kernels of cuda/loss.cu. Scores are (classes, b)."""

    def losses(
        self,
        name: str,
        scores: Any,
        labels: Any,
        scale: float,
        kappa: float,
        limit: float,
        strict: bool,
        offset: float,
        pairs: Any,
        given: Any,
        grad: Any,
        rest: Any,
        report: Any,
    ) -> None:
        """Compute the loss called `name` and its derivatives in one pass; arguments as in `Loss.fused`."""
        classes, b = scores.shape
        each = self.partial(3 * b, np.dtype(np.float64))
        seen, sums, into, left = (0 if array is None else array for array in (pairs, given, grad, rest))
        settings = (LOSSES[name], classes, b, scores, labels, scale, kappa, limit, int(strict), offset, seen, sums)
        self.spread("losses", scores.dtype, b, *settings, into, left, each)
        self.launch("loss_report", scores.dtype, (1,), (256,), classes, b, each, into, scale, report)

    def label_scores(self, scores: Any, labels: Any, out: Any) -> None:
        """out (1, b) float64 = the scores of the labels (b,), 0 for labels outside these classes."""
        self.spread("label_scores", scores.dtype, len(labels), *scores.shape, scores, labels, out)

    def normalizers(self, scores: Any, labels: Any, out: Any) -> None:
        """out (3, b) float64 = largest score, sum of exponentials relative to it, and the row of `label_scores`."""
        self.spread("normalizers", scores.dtype, len(labels), *scores.shape, scores, labels, out)

    def add_normalizers(self, first: int, scores: Any, labels: Any, out: Any) -> None:
        """Update out (3, b), the `normalizers` of earlier tiles of classes, with the scores of one more tile.

        first: the number, as in labels, of the first class of the tile.
        """
        self.spread("add_normalizers", scores.dtype, len(labels), first, *scores.shape, scores, labels, out)

    def merge_normalizers(self, gathered: Any, starts: Any, labels: Any, out: Any) -> None:
        """out (3, b) float64 = the `normalizers` of all ranks' classes, see `CrossEntropy.merge`."""
        ranks, b = len(starts) - 1, len(labels)
        self.spread("merge_normalizers", gathered.dtype, b, ranks, b, gathered, starts, labels, out)

    def close_losses(self, grad: Any, labels: Any, rest: Any, report: Any, dtype: np.dtype) -> None:
        """Complete the derivatives grad (classes, b) as in `Loss.close`, and update the report.

        report[3] becomes the largest absolute derivative; the loss becomes NaN if a sum of terms in rest (b,) is not
        finite. dtype: the dtype of the scores.
        """
        classes, b = grad.shape
        self.spread("close_losses", dtype, b, classes, b, labels, rest, grad)
        self.launch("close_report", dtype, (1,), (256,), grad.size, b, grad, rest, report)

    def add_margins(
        self, scores: Any, labels: Any, arc: bool, size: float, scale: float, least: float, slopes: Any
    ) -> None:
        settings = (scores, labels, int(arc), size, scale, least, slopes)
        self.spread("add_margins", scores.dtype, len(labels), *scores.shape, *settings)

    def multiply_labels(self, grad: Any, labels: Any, slopes: Any, report: Any) -> None:
        self.launch("multiply_labels", np.dtype(np.float64), (1,), (256,), *grad.shape, labels, slopes, grad, report)

    def distances(self, outputs: Any, targets: Any, labels: Any, scale: float, grad: Any, report: Any) -> None:
        """Compute the loss ||f - S_y||^2 of outputs f (units, b) and its derivatives grad (units, b), in one pass.

        S_y: column y of targets S (units, classes) float64, for the label y of a sample. report[1] and report[2] are 0.
        """
        count = min(blocks(outputs.size, 1024), BLOCKS)
        partial = self.partial(4 * count, np.dtype(np.float64))
        shape = (targets.shape[1], outputs.shape[1], outputs.size)
        self.launch(
            "distances", outputs.dtype, (count,), (256,), *shape, outputs, targets, labels, scale, grad, partial
        )
        # The kernel loss_report adds up the results of blocks like those of samples with one score each.
        peaks = partial[3 * count :]
        self.launch("loss_report", outputs.dtype, (1,), (256,), 1, count, partial, peaks, scale, report)

    def psl_loss(self, *args: Any) -> None:
        self.losses("psl", *args)

    def logistic_loss(self, *args: Any) -> None:
        self.losses("logistic", *args)

    def nll_loss(self, *args: Any) -> None:
        self.losses("nll", *args)

    def squared_loss(self, *args: Any) -> None:
        self.losses("squared", *args)

    def bce_loss(self, *args: Any) -> None:
        self.losses("bce", *args)

    def cast_scores(self, grad: Any, out: Any, report: Any) -> None:
        self.spread("cast_scores", out.dtype, out.size, out.size, grad, out, report)

    def unscale(self, g: Any, report: Any, limit: float) -> None:
        self.spread("unscale", g.dtype, g.size, g.size, g, report, limit)

    def bound(self, g: Any, limit: float) -> None:
        self.spread("bound", g.dtype, g.size, g.size, g, limit)
