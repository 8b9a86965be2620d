"""Findings, printed as they are made, and the report of them all."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

from psmpi.errors import UserError, counted

Level = Literal["good", "warning", "error"]
STYLES = {"good": None, "warning": "yellow", "error": "bold red"}
# Columns of levels and subjects.
WIDTHS = (7, 11)


class Finding(NamedTuple):
    """One line of the report; the text of a warning or an error ends with what to do about it."""

    level: Level
    subject: str
    text: str


def good(subject: str, text: str) -> Finding:
    return Finding("good", subject, text)


def warning(subject: str, text: str) -> Finding:
    return Finding("warning", subject, text)


def error(subject: str, text: str) -> Finding:
    return Finding("error", subject, text)


def guarded(subject: str, findings: Iterable[Finding]) -> Iterator[Finding]:
    """The findings of a check; what keeps it from looking any further is an error of its own."""
    try:
        yield from findings
    except UserError as trouble:
        yield error(subject, str(trouble))
    except OSError as trouble:
        yield error(subject, f"{trouble}: let this user read and write there, or name another place")
    except ImportError as trouble:
        yield error(
            subject, f"{trouble}: install it, or psmpi again (pip install psmpi, in a checkout pip install -e .)"
        )


class Report:
    """Findings in their order. shown: whether each is printed at once; else `table` has them all in the end."""

    def __init__(self, *, shown: bool):
        from psmpi.output import Screen

        self.screen = Screen(quiet=not shown)
        self.findings: list[Finding] = []
        # Beside the findings: ranks and their places, pairs of ranks and their paces.
        self.more: dict[str, Any] = {}

    def add(self, findings: Iterable[Finding]) -> None:
        for one in findings:
            self.findings.append(one)
            line = f"{one.level:{WIDTHS[0]}}  {one.subject:{WIDTHS[1]}}  {one.text}"
            self.screen.tell(line, style=STYLES[one.level])

    @property
    def status(self) -> int:
        """The exit status: 1 where there is an error."""
        return int(any(one.level == "error" for one in self.findings))

    def json(self) -> str:
        found = [one._asdict() for one in self.findings]
        return json.dumps({"status": self.status, "findings": found, **self.more}, indent=2)

    def summary(self) -> str:
        """How many findings there are of each level."""
        number = {level: sum(one.level == level for one in self.findings) for level in STYLES}
        parts = [counted(number["warning"], "warning"), counted(number["error"], "error")]
        return f"{number['good']} good, {', '.join(parts)}"
