"""The command line of the checkpoint tools."""

from __future__ import annotations

import sys
from collections.abc import Callable

from psmpi.errors import UserError


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status, 0 done, 1 error or damaged."""
    import tyro
    from tyro.extras import SubcommandApp

    from psmpi.command import program
    from psmpi.inspect.change import average, cut, join, prune
    from psmpi.inspect.compare import diff
    from psmpi.inspect.export import export
    from psmpi.inspect.figures import stats
    from psmpi.inspect.look import list_, show, verify

    app = SubcommandApp()
    commands: tuple[Callable[..., int], ...] = (show, stats, diff, verify, export, average, prune, cut, join)
    for command in commands:
        app.command(command)
    app.command(name="list")(list_)
    try:
        return int(
            app.cli(
                prog=program("inspect"),
                description="Look into checkpoints and change them. A run directory stands for its newest checkpoint.",
                args=sys.argv[1:] if argv is None else argv,
                config=(tyro.conf.OmitArgPrefixes,),
            )
        )
    except UserError as error:
        print(f"psmpi.inspect: error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # Whoever read the output has seen enough.
        sys.stderr.close()
        return 1
    except OSError as error:
        print(f"psmpi.inspect: error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
