"""Curves of training runs: `python -m psmpi.plot adam=RUN1 adam=RUN2 plbfgs=RUN3 --out curves.png`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from tyro.conf import Positional, arg

from psmpi.errors import UserError
from psmpi.files.rows import read_rows
from psmpi.output import legible, printable, tell

Axis = Literal["epoch", "step", "seconds", "megabytes"]
Figures = Literal[
    "test_accuracy", "test_top5", "test_rmse", "test_loss", "train_loss", "validation_accuracy", "validation_top5",
    "validation_rmse", "validation_loss",
]  # fmt: skip

# Figures for the vertical axis if --y is not given: the first that all runs have measured.
BY_DEFAULT: tuple[Figures, ...] = ("test_accuracy", "validation_accuracy", "test_rmse", "validation_rmse")
# float64 represents all whole numbers up to this one.
MOST = 2**53
# Titles of the axes.
TITLES = {
    "epoch": "epoch",
    "step": "step",
    "seconds": "seconds",
    "megabytes": "MB sent by all ranks",
    "test_accuracy": "test accuracy, %",
    "test_top5": "label among the 5 largest scores, %",
    "test_rmse": "test RMSE",
    "test_loss": "test loss",
    "train_loss": "training loss",
    "validation_accuracy": "validation accuracy, %",
    "validation_top5": "label among the 5 largest scores of validation samples, %",
    "validation_rmse": "validation RMSE",
    "validation_loss": "validation loss",
}


def plot(
    runs: Positional[Annotated[tuple[str, ...], arg(metavar="[LABEL=]RUN")]],
    /,
    out: Path,
    x: Axis = "epoch",
    y: Figures | None = None,
    low: float | None = None,
    high: float | None = None,
    title: str = "",
) -> int:
    """Draw the curves of runs: for each label the mean of its runs, and the range between least and most.

    Args:
        runs: Run directories. Those with the same label before = belong together, such as several seeds.
        out: Picture to write: .png, .svg or .pdf.
        x: Horizontal axis.
        y: Vertical axis. If not given: the first of test and validation accuracy and RMSE that the runs have.
        low: Lower end of the vertical axis.
        high: Upper end of the vertical axis.
        title: Title of the picture.
    """
    if not out.suffix:
        raise UserError(f"--out {out}: expected a name that ends in .png, .svg or .pdf")
    if not runs:
        raise UserError("plot: give run directories")
    curves: dict[str, list[list[dict[str, float]]]] = {}
    for text in runs:
        # The name of an existing folder may contain an = too.
        label, separator, run = (text, "", "") if Path(text).is_dir() else text.partition("=")
        place = Path(run if separator else text)
        curves.setdefault(label if separator else place.name, []).append(_read(place))
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("plot needs matplotlib: pip install 'psmpi[plot]'") from None
    if low is not None and high is not None and not low < high:
        raise UserError(f"--low {low:g} --high {high:g}: expected a number and one above it")
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    all_rows = [row for several in curves.values() for rows in several for row in rows]
    measured = [name for name in BY_DEFAULT if all(name in row for row in all_rows)]
    up: Figures = y if y is not None else (*measured, *BY_DEFAULT)[0]
    for label, several in curves.items():
        for option, name in (("--y", up), ("--x", "bytes_sent" if x == "megabytes" else x)):
            if any(name not in row for rows in several for row in rows):
                has = ", ".join(known for known in get_args(Figures) if known in several[0][0])
                raise UserError(f"{option} {name}: the runs of {label} have not measured it: choose one of {has}")
        length = min(map(len, several))
        along = [_mean([_value(rows[k], x) for rows in several]) for k in range(length)]
        values = [[_value(rows[k], up) for rows in several] for k in range(length)]
        means = [_mean(v) for v in values]
        shown = [v for v in means if isfinite(v) and (low is None or v >= low) and (high is None or v <= high)]
        if not shown:
            finite = [v for v in means if isfinite(v)]
            if not finite:
                raise UserError(f"nothing to draw of {label}: none of its {up} is finite")
            raise UserError(
                f"nothing to draw of {label}: all of its {up} lies from {min(finite):.4g} to {max(finite):.4g}: change "
                "--low and --high"
            )
        # A point without finite neighbours is on no line, so it gets a marker.
        near = [(*means[max(0, k - 1) : k], *means[k + 1 : k + 2]) for k in range(length)]
        isolated = [k for k in range(length) if not any(map(isfinite, near[k]))]
        (line,) = axes.plot(along, means, label=label, marker="o" if isolated else None, markevery=isolated)
        if len(several) > 1:
            band = [min(v) for v in values], [max(v) for v in values]
            if length > 1:
                axes.fill_between(along, *band, alpha=0.2, color=line.get_color(), linewidth=0)
            else:
                axes.vlines(along, *band, color=line.get_color())
    axes.set_xlabel(TITLES[x])
    axes.set_ylabel(TITLES[up])
    axes.set_ylim(low, high)
    axes.set_title(legible(title), parse_math=False)
    axes.grid(alpha=0.3)
    # Set the names in the legend by hand: matplotlib leaves out names that begin with _, and reads $ as a formula.
    for entry, label in zip(axes.legend(axes.lines, map(str, range(len(curves)))).get_texts(), curves, strict=True):
        entry.set_parse_math(False)
        entry.set_text(printable(legible(label)))
    try:
        figure.savefig(out, dpi=110)
    except FileNotFoundError:
        raise UserError(f"--out {out}: there is no such folder as {out.parent}: make it, or name another one") from None
    except (OSError, ValueError) as error:
        raise UserError(f"--out {out}: {error}") from None
    tell(f"wrote {out}")
    return 0


def _read(run: Path) -> list[dict[str, float]]:
    """Rows of a run's metrics.jsonl, one for each epoch; UserError if there are none or the file cannot be read."""
    path, known = run / "metrics.jsonl", {*TITLES, "bytes_sent"}
    try:
        rows = [{name: _number(row[name], name) for name in row.keys() & known} for row in read_rows(path)]
    except FileNotFoundError:
        raise UserError(f"{path} is not there: give a run directory, the --out of a training run") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not rows:
        raise UserError(f"{path} has no rows yet: the first epoch is not done")
    return rows


def _number(value: Any, name: str) -> float:
    """Convert a number, infinity and NaN included, to float. ValueError for other types and whole numbers over MOST."""
    if type(value) not in (int, float) or (type(value) is int and abs(value) > MOST):
        raise ValueError(f"{name} is {str(value)[:40]!r}, and no number")
    return float(value)


def _value(row: dict[str, float], name: str) -> float:
    if name == "megabytes":
        return float(row["bytes_sent"]) / 1e6
    return float(row[name]) * (100 if name.endswith(("_accuracy", "_top5")) else 1)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 done, 1 error."""
    from psmpi.command import answer, parsed

    return answer(lambda: int(parsed(plot, sys.argv[1:] if argv is None else argv, "plot")))


if __name__ == "__main__":
    sys.exit(main())
