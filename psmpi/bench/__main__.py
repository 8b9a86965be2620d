"""The command line of the measurements."""

from __future__ import annotations

import sys
from collections.abc import Callable


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 done, 1 a goal is missed or an error."""
    import tyro
    from tyro.extras import SubcommandApp

    from psmpi.bench.checkpoint import checkpoint
    from psmpi.bench.compute import compute
    from psmpi.bench.published import published
    from psmpi.comm.world import run

    app = SubcommandApp()
    commands: tuple[Callable[..., int], ...] = (checkpoint, compute, published)
    for command in commands:
        app.command(command)

    def go() -> int:
        return int(
            app.cli(
                prog="python -m psmpi.bench",
                description="Measure psmpi.",
                args=sys.argv[1:] if argv is None else argv,
                config=(tyro.conf.OmitArgPrefixes,),
            )
        )

    try:
        return run(go)
    except SystemExit as end:
        return 1 if end.code else 0


if __name__ == "__main__":
    sys.exit(main())
