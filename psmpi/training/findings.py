"""Tables of predictions on a screen: scores with a confusion matrix or the worst classes, or first predictions."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from psmpi.data.names import listed
from psmpi.errors import counted
from psmpi.nn.finite import spans
from psmpi.output import Screen, tell

# Up to so many classes have a confusion matrix; of more classes the worst are shown.
MATRIX = 20
# Numbers of classes, pairs, outputs and samples in tables.
SHOWN = FIRST = 10


def table(title: str, *names: str, room: int = 1) -> Table:
    """A narrow table with right-aligned columns `names`; room: spaces between columns, besides one."""
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, room, 0, 0), show_edge=False)
    for name in names:
        made.add_column(name, justify="right")
    return made


def _of(report: dict[str, Any]) -> None:
    tell(f"{report['checkpoint']}: {counted(report['samples'], 'sample')} of {report['dataset']} ({report['split']})")


def show_values(
    report: dict[str, Any], means: np.ndarray, titles: Sequence[str], first: Sequence[Sequence[Any]]
) -> None:
    """Print the errors of predicted values, or without targets the first values.

    means: of each output, over samples: squared errors, targets, squared targets (3, outputs); first: numbers of the
    first samples, named by `titles`, and their values.
    """
    _of(report)
    outputs = report["outputs"]
    if "rmse" not in report:
        tell("values predicted; no RMSE (it needs targets y)")
        shown = table("first predictions", *titles, *(f"value {k}" for k in outputs[:SHOWN]))
        for row in first:
            numbers, values = row[: len(titles)], row[len(titles) :][:SHOWN]
            shown.add_row(*map(str, numbers), *(f"{value:.5g}" for value in values))
        Screen().print(shown)
        return
    tell(f"RMSE {report['rmse']:.5g}")
    shown = table("scores", "output", "RMSE", "mean of targets", "their deviation", "R2")
    for k, (error, mean, square) in list(zip(outputs, means.T, strict=True))[:SHOWN]:
        spread = max(0.0, square - mean**2)
        share = f"{1 - error / spread:.4f}" if spread else "-"
        shown.add_row(str(k), f"{sqrt(error):.5g}", f"{mean:.5g}", f"{sqrt(spread):.5g}", share)
    Screen().print(shown)
    _say_more(len(outputs), "output")


def _say_more(count: int, noun: str) -> None:
    if count > SHOWN:
        tell(f"and {counted(count - SHOWN, noun)} more, which --out FILE.csv has")


def show_choices(
    report: dict[str, Any],
    labels: np.ndarray,
    predicted: np.ndarray,
    names: Sequence[str],
    titles: Sequence[str],
    first: Sequence[tuple[list[int], list[int], Any]],
) -> None:
    """Print accuracies of predicted classes (n,) against labels (n,), or without labels the first predictions.

    names: of the classes, empty if they go by numbers; first: of the first samples the numbers (named by `titles`), the
    classes with the largest scores, and these scores, largest first.
    """

    def called(label: int) -> str:
        return names[label] if names else str(label)

    screen = Screen()
    _of(report)
    if "accuracy" not in report:
        which = f"classes {listed(report['names'] if 'names' in report else [spans(report['classes'])])}"
        tell(f"scores of {which}; no accuracy (it needs labels, and the scores of all classes)")
        shown = table("first predictions", *titles, "predicted", "score", "second", "score")
        for numbers, chosen, scores in first:
            best = list(zip(chosen, scores, strict=True))[:2]
            shown.add_row(*map(str, numbers), *(word for c, score in best for word in (called(c), f"{score:.4g}")))
        screen.print(shown)
        return
    counts = np.bincount(labels, minlength=len(report["classes"]))
    right = np.bincount(labels[labels == predicted], minlength=len(counts))
    shares = right[counts > 0] / counts[counts > 0]
    shown = table("scores", "accuracy", *(["top 5"] if "top5" in report else []), "mean over classes", "worst class")
    scores = [report["accuracy"], *([report["top5"]] if "top5" in report else []), shares.mean(), shares.min()]
    shown.add_row(*(f"{100 * score:.2f} %" for score in scores))
    screen.print(shown)
    if len(counts) <= MATRIX:
        _show_matrix(screen, report["confusion"], called)
        return
    _show_worst(screen, counts, right, called)
    _show_pairs(labels, predicted, called)


def _show_matrix(screen: Screen, confusion: Sequence[Sequence[int]], called: Any) -> None:
    classes = range(len(confusion))
    names = ("label", *map(called, classes), "right")
    # Many classes: no second space between columns, to fit a terminal.
    shown = table("confusion: rows are labels, columns predictions", *names, room=int(len(classes) <= SHOWN))
    for label, row in enumerate(confusion):
        share = f"{100 * row[label] / sum(row):.1f} %" if sum(row) else "-"
        shown.add_row(called(label), *(str(n) if n else "." for n in row), share)
    screen.print(shown)


def _show_worst(screen: Screen, counts: np.ndarray, right: np.ndarray, called: Any) -> None:
    """Print the classes with the smallest share of right predictions, larger classes first among equals."""
    share = np.where(counts > 0, right / np.maximum(1, counts), 2.0)
    shown = table("worst classes", "label", "samples", "right")
    for label in np.lexsort((-counts, share))[: min(SHOWN, np.count_nonzero(counts))].tolist():
        shown.add_row(called(label), f"{counts[label]:,}", f"{100 * share[label]:.1f} %")
    screen.print(shown)


def confused(labels: np.ndarray, predicted: np.ndarray) -> list[list[int]]:
    """[label, prediction, samples] of confused pairs of classes, most frequent first."""
    wrong = labels != predicted
    pairs, counts = np.unique(np.stack([labels[wrong], predicted[wrong]]), axis=1, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    rows: list[list[int]] = np.concatenate([pairs, counts[None]])[:, order].T.tolist()
    return rows


def _show_pairs(labels: np.ndarray, predicted: np.ndarray, called: Any) -> None:
    several = confused(labels, predicted)
    tell(f"{counted(len(several), 'pair')} of classes confused" + (", most often:" if several else ""))
    for label, choice, count in several[:SHOWN]:
        tell(f"  label {called(label)} taken for {called(choice)}: {counted(count, 'sample')}")
