"""Files of rows, one JSON object in a line, such as metrics.jsonl."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Most bytes of a line; rows of runs have some thousand, and some hundred thousand with the operations of a rank.
LONGEST = 1 << 24


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file. OSError if the file cannot be read, ValueError for a line that is not a row."""
    # Refuse pipes, since a read would wait for data.
    if path.exists() and not path.is_file():
        raise ValueError("it is no regular file")
    with path.open("rb") as file:
        number = 0
        while line := file.readline(LONGEST):
            number += 1
            if len(line) == LONGEST:
                raise ValueError(f"line {number} has {LONGEST:,} bytes or more")
            try:
                row = json.loads(line.decode())
            except RecursionError:
                raise ValueError(f"line {number} has values in values without end") from None
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is no row")
            yield row
