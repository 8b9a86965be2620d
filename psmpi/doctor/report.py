"""Findings, which are printed at once, and the report of all findings."""

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
    """One line of the report. The text of a warning or an error ends with its remedy."""

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
    """Yield the findings of a check; an exception that ends the check becomes an error finding."""
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
    """All findings, in order. shown: whether `add` prints each finding at once."""

    def __init__(self, *, shown: bool):
        from psmpi.output import Screen

        self.screen = Screen(quiet=not shown)
        self.findings: list[Finding] = []
        # More entries of the JSON report: ranks and pairs of ranks.
        self.more: dict[str, Any] = {}

    def add(self, findings: Iterable[Finding]) -> None:
        """Add findings, and print them if the report is shown."""
        for finding in findings:
            self.findings.append(finding)
            line = f"{finding.level:{WIDTHS[0]}}  {finding.subject:{WIDTHS[1]}}  {finding.text}"
            self.screen.tell(line, style=STYLES[finding.level])

    @property
    def status(self) -> int:
        """The exit status: 1 if there is an error, else 0."""
        return int(any(finding.level == "error" for finding in self.findings))

    def json(self) -> str:
        """The report as JSON."""
        findings = [finding._asdict() for finding in self.findings]
        return json.dumps({"status": self.status, "findings": findings, **self.more}, indent=2)

    def summary(self) -> str:
        """Text with the number of findings of each level."""
        number = {level: sum(finding.level == level for finding in self.findings) for level in STYLES}
        parts = [counted(number["warning"], "warning"), counted(number["error"], "error")]
        return f"{number['good']} good, {', '.join(parts)}"
