"""The command line of the measurements."""

from __future__ import annotations

import sys
from collections.abc import Callable
from inspect import Signature, signature
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from psmpi.config import Config


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 done, 1 an error, or a published accuracy is missed."""
    from psmpi.bench.checkpoint import checkpoint
    from psmpi.bench.compute import compute
    from psmpi.bench.head import head
    from psmpi.bench.kernels import kernels
    from psmpi.bench.memory import memory
    from psmpi.bench.network import network
    from psmpi.bench.optimizer import optimizer
    from psmpi.bench.private import private
    from psmpi.bench.published import published
    from psmpi.bench.recorder import recorder
    from psmpi.bench.start import start
    from psmpi.bench.step import step
    from psmpi.bench.trunk import trunk
    from psmpi.command import answer, chosen
    from psmpi.config import defaults

    words = sys.argv[1:] if argv is None else argv

    def go() -> int:
        default = defaults(words)
        commands: tuple[Callable[..., int], ...] = (
            checkpoint, compute, head, kernels, _with(memory, default, words), network,
            _with(optimizer, default, words), private, published, _with(recorder, default, words), start,
            _with(step, default, words), trunk,
        )  # fmt: skip
        return chosen(commands, words, "bench", "Measure psmpi.")()

    return answer(go)


def _with(measure: Callable[..., int], default: Config, words: list[str]) -> Callable[..., int]:
    """A command whose options are those of training, with the TOML file's settings as their defaults."""
    from psmpi.config import check, command_line, from_command_line, given, given_names
    from psmpi.errors import layers_in
    from psmpi.training.usual import usual

    tree = command_line(default)
    by_default = tree()

    def command(config: Any = by_default, **more: Any) -> int:
        found = from_command_line(config)
        check(found, given_names(words, file=False))
        with layers_in(given(words, "--config")):
            return measure(usual(found), **more)

    command.__name__, command.__doc__ = measure.__name__, measure.__doc__
    first, *others = signature(measure).parameters.values()
    command.__annotations__ = {**measure.__annotations__, "config": tree}
    command.__signature__ = Signature([first.replace(default=by_default), *others])  # type: ignore[attr-defined]
    return command


if __name__ == "__main__":
    sys.exit(main())
