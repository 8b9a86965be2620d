"""The embedded data set: 1,797 handwritten digits of 8 x 8 pixels with the values 0..16."""

from __future__ import annotations

import gzip
from importlib.resources import files
from pathlib import Path

import numpy as np

from psmpi.data.files import reading
from psmpi.data.rows import ArrayRows
from psmpi.data.split import Dataset, Split, every_fifth, frozen, hold_out
from psmpi.errors import UserError

SAMPLES, PIXELS = 1797, 64


def open_digits() -> Dataset:
    """Load the digits: uint8 values 0..16, shape (1, 8, 8), 10 classes, 1,438 training and 359 test samples.

    UserError if the installed file is damaged.
    """
    resource = files("psmpi.data") / "digits.csv.gz"
    with reading(Path(str(resource))), resource.open("rb") as packed:
        text = gzip.decompress(packed.read()).decode("ascii", "replace")
    try:
        table = np.loadtxt(text.splitlines(), dtype=np.uint8, delimiter=",", ndmin=2)
    except ValueError as error:
        raise UserError(f"{resource}: not a table of small integers ({error}); install psmpi again") from error
    if table.shape != (SAMPLES, PIXELS + 1) or table[:, :-1].max() != 16 or table[:, -1].max() != 9:
        raise UserError(
            f"{resource}: found a table of shape {table.shape}; expected {SAMPLES} lines of {PIXELS} values "
            "0..16 and a label 0..9; install psmpi again"
        )
    source = ArrayRows(np.ascontiguousarray(table[:, :-1]))
    train, test = hold_out(every_fifth(SAMPLES), Split(frozen(table[:, -1]), (1, 8, 8), 1 / 16, source))
    return Dataset("digits", 10, (1, 8, 8), train, test)
