"""The command line of the measurements."""

from __future__ import annotations

import sys
from collections.abc import Callable


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 done, 1 a goal is missed or an error."""
    import tyro
    from tyro.extras import SubcommandApp

    from psmpi.bench.published import published
    from psmpi.errors import UserError

    app = SubcommandApp()
    command: Callable[..., int] = published
    app.command(command)
    try:
        return app.cli(
            prog="python -m psmpi.bench",
            description="Measure psmpi.",
            args=sys.argv[1:] if argv is None else argv,
            config=(tyro.conf.OmitArgPrefixes,),
        )
    except UserError as error:
        print(f"psmpi.bench: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
