"""Train a partitioned network: `mpirun -n N python -m psmpi.train`, or without mpirun on one process."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from psmpi.checkpoint import Contents
    from psmpi.comm.control import Control
    from psmpi.comm.protocol import World
    from psmpi.config import Config

# The exit status of a run that was stopped by a signal, and can be gone on with.
GO_ON = 85

DESCRIPTION = """Train a neural network whose loss is a sum of element losses, each rank computing its own.

Run it under mpirun or srun; one process does all the work where there is no launcher."""


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 done, 1 error, 85 stopped by a signal and saved."""
    from psmpi.comm.world import run

    return run(lambda: _main(sys.argv[1:] if argv is None else argv))


def parse(argv: list[str]) -> Config:
    """The configuration: defaults, then the TOML file, then the command line. Raises SystemExit as argparse does."""
    import tyro

    from psmpi.command import program
    from psmpi.config import command_line, defaults, from_command_line

    tree = tyro.cli(
        command_line(defaults(argv)),
        prog=program("train"),
        description=DESCRIPTION,
        config=(tyro.conf.OmitArgPrefixes,),
        args=argv,
    )
    return from_command_line(tree)


def _main(argv: list[str]) -> int:
    from psmpi.comm.control import Control
    from psmpi.comm.world import start

    world = start()
    control = Control(world)
    config, status = _configure(control, argv)
    if config is None:
        return status
    return 0 if _train(world, control, config) else GO_ON


def _configure(control: Control, argv: list[str]) -> tuple[Config | None, int]:
    """Rank 0 reads and checks the command line, so that help and errors appear once; the others get its result."""
    from psmpi.config import from_toml, to_toml

    text, status = "", 0
    if control.rank == 0:
        try:
            text = to_toml(_settle(parse(argv)))
        except SystemExit as end:
            status = 1 if end.code else 0
    text, status = json.loads(control.share(json.dumps([text, status])))
    return (from_toml(text, "configuration"), 0) if text else (None, status)


def _settle(config: Config) -> Config:
    """Checks that need no MPI, and a run directory where none is named."""
    from dataclasses import replace

    from psmpi import checkpoint
    from psmpi.config import check
    from psmpi.errors import UserError

    check(config)
    run = config.run
    if run.checkpoint_parallel and not checkpoint.supported():
        raise UserError(
            "--checkpoint-parallel: this h5py has no parallel HDF5; build one (HDF5_MPI=ON CC=mpicc pip install "
            "--no-binary=h5py h5py), or leave the option out"
        )
    out = run.out
    if not out:
        if run.resume == "auto":
            raise UserError("--resume auto needs --out, the run directory to go on in")
        name = Path(config.data.dataset).stem
        out = f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{name}-{config.model.model}"
        taken = (n for n in range(2, 1000) if not Path(f"{out}-{n}").exists())
        out = f"{out}-{next(taken)}" if Path(out).exists() else out
    elif not run.resume and checkpoint.available(Path(out)):
        raise UserError(f"--out {out} holds a run already: add --resume auto to go on with it, or name another folder")
    return replace(config, run=replace(run, out=out))


def _train(world: World, control: Control, config: Config) -> bool:
    """Train; whether all of it is done, and not stopped by a signal."""
    import socket
    from dataclasses import asdict
    from functools import partial

    import numpy as np
    from rich.console import Console
    from threadpoolctl import threadpool_limits

    from psmpi import checkpoint, metrics
    from psmpi.comm.signals import StopSignals
    from psmpi.comm.world import host, library
    from psmpi.config import to_toml
    from psmpi.data import open_dataset
    from psmpi.errors import UserError
    from psmpi.nn.zoo import make_network
    from psmpi.registry import find_method
    from psmpi.training.context import Context
    from psmpi.training.loop import Loop, plan_steps, show_places
    from psmpi.training.method import Place

    console = Console(quiet=world.rank != 0)
    kind: Any = find_method(config.parallel.method)
    out = Path(config.run.out)
    # Rank 0 meets a missing file or a wrong setting first, alone; the others wait here.
    found, held = "", None
    if world.rank == 0:
        dataset = open_dataset(config.data.dataset, config.data.data_dir)
        network = _network(config, dataset, make_network)
        kind.check(world.size, network, dataset, config)
        plan_steps(dataset, config)
        for warning in kind.warnings(world.size, network, config):
            console.print(f"warning: {warning}", highlight=False, markup=False, soft_wrap=True)
        tell = partial(console.print, highlight=False, markup=False, soft_wrap=True)
        try:
            out.mkdir(parents=True, exist_ok=True)
            held = checkpoint.take(out, tell)
        except (OSError, ValueError) as error:
            raise UserError(f"--out {config.run.out}: {error}; name a folder that can be made and written") from None
        if config.run.resume:
            found = str(checkpoint.find(config.run.resume, out, tell) or "")
        step = -1
        if found:
            contents = checkpoint.read_contents(Path(found))
            _compare(contents, config, dataset, found, tell)
            step = contents.progress.step
        try:
            checkpoint.clear(out, step, damaged=config.run.resume == "auto", tell=tell)
            (out / "config.toml").write_text(to_toml(config))
            metrics.write_rows(out / "metrics.jsonl", ())
        except (OSError, ValueError) as error:
            raise UserError(f"--out {config.run.out}: {error}; name a folder that can be made and written") from None
    found = control.share(found)
    if world.rank != 0:
        dataset = open_dataset(config.data.dataset, config.data.data_dir)
        network = _network(config, dataset, make_network)

    ranks, cores = host(world)
    threads = config.parallel.threads or max(1, cores // ranks)
    if world.rank == 0 and ranks * threads > cores:
        console.print(
            f"note: {ranks} rank(s) of {threads} thread(s) have {cores} core(s) on {socket.gethostname()} and wait for "
            f"each other: {'--threads 1' if threads > 1 else 'fewer ranks'} may be faster",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    # What overflows is dealt with where it matters; a diverging run says so itself, once.
    with threadpool_limits(threads), np.errstate(all="ignore"):
        ops = _backend(world, config, threads)
        method = kind(Context(world, network, dataset, config, ops))
        place = json.dumps([socket.gethostname(), *vars(method.place()).values()])
        places = [json.loads(text) for text in control.collect_texts(place)]
        show_places(console, [(rank, host, Place(*rest)) for rank, (host, *rest) in enumerate(places)])
        console.print(
            f"model {network.name}: {method.layout.size:,} parameters; backend {ops.description}; run directory {out}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        method_settings = {name: value for one in config.chosen.values() for name, value in asdict(one).items()}
        contents = checkpoint.Contents(
            to_toml(config),
            tuple(dataset.shape),
            method.layout,
            random={
                "seed": config.run.seed,
                "samples": dataset.train.n,
                "drawn_from": "seed, and for the order of samples the epoch; not from ranks",
            },
            placement={
                **asdict(config.parallel),
                **method_settings,
                "ranks": [[host, *rest] for host, *rest in places],
            },
            provenance=checkpoint.provenance(world.size, library()) if world.rank == 0 else {},
            task=dataset.task,
            own=frozenset(method.state.own & method.state.vectors.keys()),
        )
        signals = StopSignals()
        loop = Loop(control, method, dataset, config, out, console, contents, held, signals)
        if found:
            loop.resume(Path(found))
        # After MPI's own handlers.
        with signals:
            done = loop.run()
        if config.parallel.convolution != "own":
            chosen: dict[str, str] = {}
            for text in control.collect_texts("\n".join(ops.choices), most=10_000):
                for line in text.splitlines():
                    # Where ranks have the same sizes, the first one speaks for them.
                    chosen.setdefault(line.partition(":")[0], line)
            for line in chosen.values():
                console.print(line, highlight=False, markup=False, soft_wrap=True)
    return done


def _backend(world: Any, config: Config, threads: int) -> Any:
    """The backend of this rank, its kernels compiled."""
    import numpy as np

    from psmpi.backend import make_backend
    from psmpi.comm import nccl
    from psmpi.comm.world import host_by_host, local_rank
    from psmpi.errors import UserError

    parallel, dtype = config.parallel, np.dtype(config.model.dtype)
    settings = (parallel.compute, parallel.cuda_graphs, parallel.convolution)
    made = [make_backend(parallel.backend, threads, local_rank(world), *settings)]

    def compile_kernels() -> None:
        try:
            made[0].compile(dtype)
        except UserError as error:
            if parallel.backend == "cupy":
                raise
            made[0] = make_backend("auto", threads)
            if world.rank == 0:
                print("note: the GPU is not used:", str(error).removeprefix("--backend cupy: "))

    # The first rank of a host compiles the kernels, the others find them in its cache.
    host_by_host(world, compile_kernels)
    ops = made[0]
    if not ops.on_device:
        for option, given in (
            ("--gpu-aware", parallel.gpu_aware),
            ("--nccl", parallel.nccl),
            (f"--compute {parallel.compute}", parallel.compute != "float32"),
            (f"--convolution {parallel.convolution}", parallel.convolution != "own"),
        ):
            if given:
                raise UserError(f"{option} is for GPUs, and the backend here is {ops.name}: add --backend cupy")
    elif parallel.nccl:
        nccl.check_devices(world, ops.pci_id)
    return ops


def _compare(contents: Contents, config: Config, dataset: Any, path: str, tell: Callable[[str], None]) -> None:
    """Tell which settings differ from those of the checkpoint; UserError where the minibatches would not go on."""
    from psmpi.config import from_toml
    from psmpi.errors import UserError

    saved, progress, samples = from_toml(contents.config, path, foreign=True), contents.progress, dataset.train.n
    if contents.task != dataset.task:
        means = {"classes": "labels", "regression": "values"}
        raise UserError(
            f"checkpoint {path} has learnt {means[contents.task]}, and the targets of --dataset {config.data.dataset} "
            f"are {means[dataset.task]}: use the data set it was made with, or start afresh without --resume"
        )
    fixed = [("--batch-size", saved.data.batch_size, config.data.batch_size)]
    if progress.cursor:
        fixed += [
            ("--seed", saved.run.seed, config.run.seed),
            ("--shuffle", saved.data.shuffle, config.data.shuffle),
            ("--dataset, number of samples", contents.random.get("samples", samples), samples),
        ]
    for option, before, now in fixed:
        if before != now:
            inside = f" (it is {progress.cursor} steps into epoch {progress.epoch + 1})" if progress.cursor else ""
            raise UserError(
                f"checkpoint {path} was made with {option} {before}: its place among the minibatches{inside} has no "
                f"meaning with {now}; use the same"
            )
    old, new = (_results(c) for c in (saved, config))
    for key, value in new.items():
        if key in old and value != old[key]:
            tell(f"note: {key} is {value}, in the checkpoint it was {old[key]}")


def _results(config: Config) -> dict[str, Any]:
    """The settings that change a training's results, by name."""
    from dataclasses import asdict

    from psmpi.optim import find_optimizer

    sections = (config.data, config.model, config.objective, config.optimization)
    chosen = [one for one in config.chosen.values() if one.results]
    found = {name: value for one in (*sections, *chosen) for name, value in asdict(one).items() if name != "data_dir"}
    # With the numbers that stand for what is not given.
    found |= find_optimizer(config.optimization.optimizer).chosen(config.optimization)
    found = {name: value for name, value in found.items() if value is not None}
    return {**found, "epochs": config.run.epochs, "seed": config.run.seed}


def _network(config: Config, dataset: Any, make_network: Any) -> Any:
    model = config.model
    return make_network(model.model, dataset.shape, dataset.outputs, **model.shape)


if __name__ == "__main__":
    sys.exit(main())
