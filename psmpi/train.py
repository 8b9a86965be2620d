"""Train a partitioned network: `mpirun -n N python -m psmpi.train`, or without mpirun on one process."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from psmpi.config import Config

DESCRIPTION = """Train a neural network whose loss is a sum of element losses, each rank computing its own.

Run it under mpirun or srun; one process does all the work where there is no launcher."""


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status, 0 done, 1 error."""
    from psmpi.comm.world import run

    return run(lambda: _main(sys.argv[1:] if argv is None else argv))


def parse(argv: list[str]) -> Config:
    """The configuration: defaults, then the TOML file, then the command line. Raises SystemExit as argparse does."""
    import tyro

    from psmpi.config import Config, read_file

    # The file has to be known before the command line can be read on top of it.
    path = ""
    for at, word in enumerate(argv):
        if word == "--config" and at + 1 < len(argv):
            path = argv[at + 1]
        elif word.startswith("--config="):
            path = word.partition("=")[2]
    return tyro.cli(
        Config,
        prog="python -m psmpi.train",
        description=DESCRIPTION,
        default=read_file(path) if path else Config(),
        config=(tyro.conf.OmitArgPrefixes,),
        args=argv,
    )


def _main(argv: list[str]) -> int:
    from psmpi.comm.world import start

    world = start()
    config, status = _configure(world, argv)
    if config is None:
        return status
    _train(world, config)
    return 0


def _configure(world: Any, argv: list[str]) -> tuple[Config | None, int]:
    """Rank 0 reads and checks the command line, so that help and errors appear once; the others get its result."""
    from psmpi.comm.world import share
    from psmpi.config import from_toml, to_toml

    text, status = "", 0
    if world.rank == 0:
        try:
            text = to_toml(_settle(parse(argv)))
        except SystemExit as end:
            status = 1 if end.code else 0
    text, status = json.loads(share(world, json.dumps([text, status])))
    return (from_toml(text, "configuration"), 0) if text else (None, status)


def _settle(config: Config) -> Config:
    """Checks that need no MPI, and a run directory where none is named."""
    from dataclasses import replace

    from psmpi import checkpoint
    from psmpi.errors import UserError

    run = config.run
    for name, value, least in (
        ("--epochs", run.epochs, 1),
        ("--max-steps", run.max_steps, 0),
        ("--checkpoint-every", run.checkpoint_every, 0),
        ("--checkpoint-keep", run.checkpoint_keep, 0),
        ("--seed", run.seed, 0),
        ("--threads", config.parallel.threads, 0),
        ("--replicas", config.parallel.replicas, 0),
        ("--batch-size", config.data.batch_size, 1),
    ):
        if value < least:
            raise UserError(f"{name} {value}: expected a whole number from {least} up")
    for option, number in (("--lr", config.optimization.lr), ("--init-gain", config.model.init_gain)):
        if not number > 0:
            raise UserError(f"{option} {number}: expected a number above 0")
    if not config.optimization.clip >= 0:
        raise UserError(f"--clip {config.optimization.clip}: expected 0 (no clipping) or a number above it")
    if not 0 <= run.checkpoint_gzip <= 9:
        raise UserError(f"--checkpoint-gzip {run.checkpoint_gzip}: expected 0 (none) to 9")
    out = run.out
    if not out:
        if run.resume == "auto":
            raise UserError("--resume auto needs --out, the run directory to go on in")
        name = Path(config.data.dataset).stem
        out = f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{name}-{config.model.model}"
    elif not run.resume and checkpoint.available(Path(out)):
        raise UserError(f"--out {out} holds a run already: add --resume auto to go on with it, or name another folder")
    return replace(config, run=replace(run, out=out))


def _collect(world: Any, text: str) -> list[str]:
    """Every rank's text (cut at 1,000 bytes), on rank 0."""
    import numpy as np

    mine = np.zeros(1000, np.uint8)
    data = text.encode()[:1000]
    mine[: len(data)] = np.frombuffer(data, np.uint8)
    rows = np.empty((world.size, 1000), np.uint8) if world.rank == 0 else None
    world.Gather(mine, rows, root=0)
    return [] if rows is None else [row.tobytes().rstrip(b"\0").decode() for row in rows]


def _train(world: Any, config: Config) -> None:
    import socket
    from dataclasses import asdict
    from functools import partial

    from rich.console import Console
    from threadpoolctl import threadpool_limits

    from psmpi import checkpoint, metrics
    from psmpi.backend import make_backend
    from psmpi.comm.world import library, share
    from psmpi.config import from_toml, to_toml
    from psmpi.data import open_dataset
    from psmpi.loop import Loop, plan_steps, show_places
    from psmpi.methods import METHODS, Place
    from psmpi.nn.zoo import make_network

    console = Console(quiet=world.rank != 0)
    out = Path(config.run.out)
    # Rank 0 meets a missing file or a wrong setting first, alone; the others wait here.
    found = ""
    if world.rank == 0:
        dataset = open_dataset(config.data.dataset, config.data.data_dir)
        network = _network(config, dataset, make_network)
        METHODS[config.parallel.method].check(world.size, network, dataset, config)
        plan_steps(dataset, config)
        if config.run.resume:
            tell = partial(console.print, highlight=False, soft_wrap=True)
            found = str(checkpoint.find(config.run.resume, out, tell) or "")
        if found:
            _compare(from_toml(checkpoint.read_contents(Path(found)).config, found), config, found, console)
        out.mkdir(parents=True, exist_ok=True)
        for leftover in checkpoint.folder(out).glob(".*.part"):
            leftover.unlink()
        (out / "config.toml").write_text(to_toml(config))
        metrics.write_rows(out / "metrics.jsonl", ())
    found = share(world, found)
    if world.rank != 0:
        dataset = open_dataset(config.data.dataset, config.data.data_dir)
        network = _network(config, dataset, make_network)

    local = world.Split_type(_shared())
    threads = config.parallel.threads or max(1, (os.cpu_count() or 1) // local.size)
    local.Free()
    with threadpool_limits(threads):
        ops = make_backend(config.parallel.backend)
        method = METHODS[config.parallel.method](world, network, dataset, config, ops)
        place = json.dumps([socket.gethostname(), *vars(method.place()).values()])
        places = [json.loads(text) for text in _collect(world, place)]
        show_places(console, [(rank, host, Place(*rest)) for rank, (host, *rest) in enumerate(places)])
        console.print(
            f"model {network.name}: {method.layout.size:,} parameters; run directory {out}",
            highlight=False,
            soft_wrap=True,
        )
        contents = checkpoint.Contents(
            to_toml(config),
            tuple(dataset.shape),
            method.layout,
            random={
                "seed": config.run.seed,
                "drawn_from": "seed, and for the order of samples the epoch; not from ranks",
            },
            placement={**asdict(config.parallel), "ranks": [[host, *rest] for host, *rest in places]},
            provenance=checkpoint.provenance(world.size, library()) if world.rank == 0 else {},
        )
        loop = Loop(world, method, dataset, config, out, console, contents)
        if found:
            loop.resume(Path(found))
        loop.run()


def _compare(saved: Config, config: Config, path: str, console: Any) -> None:
    """Print the settings that differ from those of the checkpoint; UserError where the minibatches would not go on."""
    from dataclasses import asdict

    from psmpi.errors import UserError

    if saved.data.batch_size != config.data.batch_size:
        raise UserError(
            f"checkpoint {path} was made with --batch-size {saved.data.batch_size}: its place among the minibatches "
            f"has no meaning with --batch-size {config.data.batch_size}; use the same"
        )
    before, now = ({**asdict(c)["data"], **asdict(c)["model"], **asdict(c)["objective"], **asdict(c)["optimization"],
                    "seed": c.run.seed} for c in (saved, config))  # fmt: skip
    for key, value in now.items():
        if value != before[key] and key != "data_dir":
            console.print(f"note: {key} is {value}, in the checkpoint it was {before[key]}", highlight=False)


def _network(config: Config, dataset: Any, make_network: Any) -> Any:
    model = config.model
    return make_network(model.model, dataset.shape, dataset.classes, widths=model.widths, layers=model.layers)


def _shared() -> int:
    from mpi4py import MPI

    return MPI.COMM_TYPE_SHARED


if __name__ == "__main__":
    sys.exit(main())
