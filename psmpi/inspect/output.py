"""Output of the tools: texts of numbers, and JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from math import isfinite
from typing import Any

from psmpi.output import tell


def print_json(data: Any) -> int:
    """Print plain data, or dataclasses, as JSON; return the exit status 0."""
    tell(json.dumps(data, default=asdict))
    return 0


def finite(value: float) -> float | None:
    """The value, or None for infinity and NaN, which JSON does not have."""
    return float(value) if isfinite(value) else None


def figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def text(value: Any) -> str:
    return "-" if value is None else str(value)


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"


def size_text(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f} MB" if nbytes >= 1e5 else f"{nbytes / 1e3:.1f} kB"
