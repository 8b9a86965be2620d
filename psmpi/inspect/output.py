"""Output of the tools: numbers and tables, for people and as JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from math import isfinite
from typing import Any

from rich.console import Console


def make_console() -> Console:
    # A pipe has no width of its own; nothing is to be cut there.
    return Console() if sys.stdout.isatty() else Console(width=10_000)


def print_json(found: Any) -> int:
    print(json.dumps(found, default=asdict))
    return 0


def finite(value: float) -> float | None:
    """JSON has no infinities."""
    return float(value) if isfinite(value) else None


def figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def text(value: Any) -> str:
    return "-" if value is None else str(value)


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"


def size_text(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f} MB" if nbytes >= 1e5 else f"{nbytes / 1e3:.1f} kB"
