"""The command line of the measurements."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 done, 1 an error, or a published accuracy is missed."""
    from psmpi.bench.characters import characters
    from psmpi.bench.checkpoint import checkpoint
    from psmpi.bench.comm import comm
    from psmpi.bench.compute import compute
    from psmpi.bench.decoupled import decoupled
    from psmpi.bench.figures import figures
    from psmpi.bench.head import head
    from psmpi.bench.hogwild import hogwild
    from psmpi.bench.kernels import kernels
    from psmpi.bench.layers import layers
    from psmpi.bench.links import links
    from psmpi.bench.memory import memory
    from psmpi.bench.network import network
    from psmpi.bench.optimizer import optimizer
    from psmpi.bench.partition import partition
    from psmpi.bench.predict import predict
    from psmpi.bench.private import private
    from psmpi.bench.published import published
    from psmpi.bench.recorder import recorder
    from psmpi.bench.recurrent import recurrent
    from psmpi.bench.scale import scale
    from psmpi.bench.sparse import sparse
    from psmpi.bench.start import start
    from psmpi.bench.step import step
    from psmpi.bench.tensor import tensor
    from psmpi.bench.transformer import transformer
    from psmpi.bench.trunk import trunk
    from psmpi.bench.wavefront import wavefront
    from psmpi.command import answer, chosen, with_training_options
    from psmpi.config import defaults

    words = sys.argv[1:] if argv is None else argv

    def go() -> int:
        trains = partial(with_training_options, default=defaults(words), words=words)
        commands: tuple[Callable[..., int], ...] = (
            characters, checkpoint, comm, compute, decoupled, figures, head, hogwild, kernels, layers, links,
            trains(memory), network, trains(optimizer), partition, predict, private, published, trains(recorder),
            recurrent, trains(scale), sparse, start, trains(step), tensor, transformer, trunk, wavefront,
        )  # fmt: skip
        return chosen(commands, words, "bench", "Measure psmpi.")()

    return answer(go)


if __name__ == "__main__":
    sys.exit(main())
