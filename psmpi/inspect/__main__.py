"""Command line of the checkpoint tools."""

from __future__ import annotations

import sys
from collections.abc import Callable

from psmpi.errors import UserError


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status, 0 done, 1 error or damaged."""
    from psmpi.command import answer, chosen
    from psmpi.config.help import wants_help
    from psmpi.inspect.change import average, cut, join, prune
    from psmpi.inspect.compare import check_two, diff
    from psmpi.inspect.export import export
    from psmpi.inspect.figures import stats
    from psmpi.inspect.flight import flight
    from psmpi.inspect.look import list_, show, verify
    from psmpi.inspect.sparsify import sparsify

    commands: tuple[Callable[..., int], ...] = (
        show, stats, diff, verify, export, average, prune, cut, join, sparsify, flight, list_,
    )  # fmt: skip
    description = (
        "Look into checkpoints and change them, and into the operations of ranks that stood still. A run directory "
        "stands for its newest checkpoint."
    )

    words = sys.argv[1:] if argv is None else argv

    def go() -> int:
        if words[:1] == ["diff"] and not wants_help(words):
            check_two(words[1:])
        try:
            return chosen(commands, words, "inspect", description)()
        except OSError as error:
            raise UserError(f"{error.filename}: {error.strerror}" if error.filename else str(error)) from None

    return answer(go)


if __name__ == "__main__":
    sys.exit(main())
