"""Train a partitioned network: `mpirun -n N python -m psmpi.train`, or without mpirun on one process."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from psmpi.checkpoint import Contents
    from psmpi.comm.control import Control
    from psmpi.comm.protocol import World
    from psmpi.config import Config
    from psmpi.data import Dataset
    from psmpi.output import Screen
    from psmpi.training.loop import Loop

# The exit status of a run that was stopped by a signal, and can be gone on with.
GO_ON = 85

DESCRIPTION = """Train a neural network whose loss is a sum of element losses, each rank computing its own.

Run it under mpirun or srun; one process does all the work where there is no launcher."""


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 done, 1 error, 85 stopped by a signal and saved."""
    from psmpi.comm.world import run

    return run(lambda: _main(sys.argv[1:] if argv is None else argv))


def parse(argv: list[str]) -> Config:
    """The configuration: defaults, or the settings of the run that goes on, then the TOML file, then the command line.

    Raises SystemExit as argparse does.
    """
    return _parse(argv)[0]


def _parse(argv: list[str]) -> tuple[Config, str]:
    """The configuration, and the path that the settings of a run that goes on are from."""
    from dataclasses import replace

    from psmpi.command import parsed
    from psmpi.config import (
        Config,
        command_line,
        defaults,
        from_command_line,
        given,
        given_names,
        with_names,
        with_usual,
        without_unused,
    )
    from psmpi.config.unknown import tables_of, unknown_options
    from psmpi.training.resume import own_settings

    start = defaults(argv)
    said = given_names(argv)
    words = with_usual(argv, start)
    base = own_settings(given(argv, "--resume") or start.run.resume, given(argv, "--out") or start.run.out)
    if base is not None:
        own = with_names(base.config, argv)
        if "data_dir" in said and Path(own.data.dataset).is_absolute():
            # The file may have moved.
            own = replace(own, data=replace(own.data, dataset=Path(own.data.dataset).name))
        start = defaults(argv, own)
    try:
        tree = parsed(command_line(start), words, "train", DESCRIPTION)
    except SystemExit as end:
        for hint in unknown_options(argv, tables_of(Config())) if end.code else ():
            print(f"psmpi.train: {hint}", file=sys.stderr)
        raise
    config = from_command_line(tree)
    if base is None and config.optimization.optimizer != start.optimization.optimizer:
        # A file's rate is that of its optimizer.
        return without_unused(config, start, given_names(argv, file=False)), ""
    return (config, "") if base is None else (without_unused(config, base.config, said), base.path)


def _main(argv: list[str]) -> int:
    from psmpi.comm.control import Control
    from psmpi.comm.watch.flight import recorded
    from psmpi.comm.world import start

    world = recorded(start())
    control = Control(world)
    config, status, *files = _configure(control, argv)
    if config is None:
        return status
    return 0 if train(world, control, config, *files) else GO_ON


def _configure(control: Control, argv: list[str]) -> tuple[Config | None, int, str, str, str]:
    """Rank 0 reads and checks the command line, so that help and errors appear once; the others get its result.

    Beside the configuration, the exit status where there is none, the path that a run's own settings are from, that of
    the file that describes its layers, and what is to be told of the usual numbers.
    """
    from psmpi.config import defaults, from_toml, given, given_names, to_toml, with_usual
    from psmpi.errors import counted
    from psmpi.output import Screen
    from psmpi.training.resume import noting
    from psmpi.training.usual import usual

    text, status, own, layers = "", 0, "", ""
    numbers: list[str] = []
    if control.rank == 0:
        try:
            config, own = _parse(argv)
            tell = _telling(Screen(goes_on="training goes on"), config)
            data, method = Path(config.data.dataset).name, config.parallel.method
            tell(f"psmpi: {config.model.model} on {data}, method {method}, on {counted(control.size, 'rank')}")
            layers = given(argv, "--config") if "layers" in given_names(argv) else own
            added = with_usual(argv, defaults(argv))[: -len(argv) or None]
            if added:
                tell(f"note: no network is named: this is {' '.join(added)}; give --dataset and --model for your own")
            with noting(own):
                text = to_toml(usual(settle_paths(config, tell, given_names(argv, file=False)), numbers.append))
        except SystemExit as end:
            status = 1 if end.code else 0
    text, status, own, layers = json.loads(control.share(json.dumps([text, status, own, layers])))
    return from_toml(text, "configuration") if text else None, status, own, layers, "".join(numbers)


def settle_paths(config: Config, tell: Callable[[str], None], said: Collection[str]) -> Config:
    """Checks that need no MPI, and paths that hold wherever the run goes on; said: as of psmpi.config.check.

    The data set `psmpi.data.ARRAYS` is in memory, and has no path.
    """
    from dataclasses import replace

    from psmpi import checkpoint
    from psmpi.config import check
    from psmpi.data import ARRAYS, RANK, locate
    from psmpi.errors import UserError, expanded
    from psmpi.nn.layers.pattern_file import with_patterns
    from psmpi.registry import find_method
    from psmpi.track import check_trackers
    from psmpi.track.mlflow import store
    from psmpi.training.checks import check_data

    check(config, said)
    run, data = config.run, config.data
    check_trackers(run.track, run.track_dir)
    if run.checkpoint_parallel and not checkpoint.supported():
        raise UserError(
            "--checkpoint-parallel: this h5py has no parallel HDF5; build one (HDF5_MPI=ON CC=mpicc pip install "
            "--no-binary=h5py h5py), or leave the option out"
        )
    if run.new_data and not run.resume:
        raise UserError("--new-data goes on from a checkpoint with other data: add --resume, or leave it out")
    out, resume = (str(expanded(one, of)) if one else "" for one, of in ((run.out, "--out"), (run.resume, "--resume")))
    if not out and resume == "auto":
        raise UserError("--resume auto needs --out, the run directory to go on in")
    if out and not resume and checkpoint.available(Path(out)):
        raise UserError(f"--out {out} holds a run already: add --resume auto to go on with it, or name another folder")
    folder = expanded(data.data_dir, "--data-dir").absolute()
    track_dir = run.track_dir and store(run.track_dir)
    if RANK in data.dataset and not find_method(config.parallel.method).private(config):
        raise UserError(
            f"--dataset {data.dataset}: {RANK} stands for the number of a rank, where each has samples of its own: "
            "add --private-data, with a method that has it"
        )
    check_data(data, find_method(config.parallel.method).private(config))
    if data.dataset != ARRAYS:
        data = replace(data, data_dir=str(folder), dataset=locate(data.dataset, folder, tell))
    # Patterns of layers go where the configuration goes.
    model = replace(config.model, layers=with_patterns(config.model.layers))
    return replace(config, data=data, model=model, run=replace(run, out=out, resume=resume, track_dir=track_dir))


def train(
    world: World,
    control: Control,
    config: Config,
    own: str,
    layers: str,
    numbers: str,
    *,
    given: Dataset | None = None,
    labels: tuple[str | int | float | bool, ...] = (),
    screen: Screen | None = None,
    take: Callable[[Loop, Contents], None] | None = None,
) -> bool:
    """Train; whether all of it is done, and not stopped by a signal. own, layers, numbers: as of `_configure`.

    given: the data set, where it is in memory, and labels: what its classes are called; screen: what lines go to.
    take(loop, contents) is called in the end, on all ranks; with it nothing is written but to a run directory that is
    named.
    """
    import contextlib
    import os
    import socket
    from dataclasses import asdict, replace
    from functools import partial

    import numpy as np
    from threadpoolctl import threadpool_limits

    from psmpi import checkpoint
    from psmpi.comm.memory import limits
    from psmpi.comm.patience import settle
    from psmpi.comm.signals import StopSignals
    from psmpi.comm.watch.watch import watched
    from psmpi.comm.world import cores as own_cores
    from psmpi.comm.world import host, library, local_rank
    from psmpi.config import to_toml, used_settings, without_anew
    from psmpi.files import examiner
    from psmpi.launcher import announced_size, ends_ranks, process_number, shown_on
    from psmpi.output import Screen
    from psmpi.registry import find_method
    from psmpi.track import Run, Trackers
    from psmpi.training.backend import backend_of
    from psmpi.training.capacity import check_capacity
    from psmpi.training.closing import STOPPING, at_signal, begun, ended, stopped
    from psmpi.training.context import Context
    from psmpi.training.folder import RunFolder
    from psmpi.training.loop import Loop
    from psmpi.training.method import Place
    from psmpi.training.report import show_places
    from psmpi.training.start import agree, begin, network_of, share_path

    bar = {"bar": True, "lines": False}.get(config.terminal.progress)
    console = screen or Screen(quiet=world.rank != 0, goes_on="training goes on", bar=bar)
    tell = _telling(console, config)
    kind: Any = find_method(config.parallel.method)
    with contextlib.ExitStack() as stack:
        # After MPI's own handlers.
        launched, ends = announced_size(os.environ) is not None, ends_ranks(os.environ)
        signals = StopSignals(
            config.run.save_signal,
            "" if world.rank or take is not None else STOPPING,
            shown_on(2) if ends else "",
            # A person alone sends each signal once, a launcher or a batch system may do so twice.
            None if launched or "SLURM_JOB_ID" in os.environ else 0.2,
            take is None or world.size > 1,
        )
        stack.enter_context(signals)
        watch = stack.enter_context(watched(control, config.run.stall_warn, config.run.stall_abort))
        start = control.agreed((lambda: begin(control, config, own, tell, layers, given)) if world.rank == 0 else None)
        folder = stack.enter_context(start.folder) if start is not None and start.folder is not None else None
        # Ranks may have been started in other folders.
        found = share_path(control, str(Path(start.found).absolute()) if start is not None and start.found else "")
        ranks, cores = host(world)
        dataset, identity = agree(control, config, start, (local_rank(world), ranks), tell, given)
        # All files have been looked at.
        examiner.close()
        network = network_of(config, dataset)
        if start is not None:
            found = start.found
            stem = f"{Path(config.data.dataset).stem}-{config.model.model}"

            def make() -> RunFolder:
                with control.flight.task("making the run directory"):
                    return RunFolder(Path(config.run.out), tell) if config.run.out else RunFolder.unnamed(stem, tell)

        wanted = start is not None and folder is None and bool(config.run.out or take is None)
        made = control.agreed(make if wanted else None)
        folder = stack.enter_context(made) if made is not None else folder
        path = share_path(control, str(folder.path) if folder is not None else "")
        out = Path(path)
        config = replace(config, run=replace(config.run, out=path))
        again = partial(_again, world.size)
        if signals.told:
            signals.told = at_signal(str(out), ends, again)
        if numbers:
            tell(numbers)
        if watch is not None:
            watch.folder = out if path else None
        threads = config.parallel.threads or max(1, cores // ranks)
        if world.rank == 0 and ranks * threads > cores:
            tell(
                f"note: {ranks} rank(s) of {threads} thread(s) have {cores} core(s) on {socket.gethostname()} and wait "
                f"for each other: {'--threads 1' if threads > 1 else 'fewer ranks'} may be faster"
            )
        # What overflows is dealt with where it matters; a diverging run says so itself, once.
        with threadpool_limits(threads), np.errstate(all="ignore"):
            ops = backend_of(world, config, threads, tell)
            # What a device holds is not of the host's memory.
            check_capacity(control, kind, network, dataset, config, [] if ops.on_device else limits())
            method = kind(Context(world, network, dataset, config, ops))
            settle(world, own_cores(), method.place().held > 0)
            place = json.dumps([socket.gethostname(), *vars(method.place()).values()])
            places = [json.loads(text) for text in control.collect_texts(place)]
            if not config.terminal.quiet:
                show_places(console, [(rank, host, Place(*rest)) for rank, (host, *rest) in enumerate(places)])
            if config.terminal.verbose:
                held = ", ".join(f"{what} {count / 1e6:.3g}" for what, count in method.memory().items())
                tell(f"memory of rank 0 in MB: {held}")
            tell(f"model {network.name}: {method.layout.size:,} parameters; backend {ops.description}")
            for line in method.told():
                tell(line)
            method_settings = {name: value for one in config.chosen.values() for name, value in asdict(one).items()}
            # What each start says anew is not of the run.
            text = to_toml(without_anew(config))
            contents = checkpoint.Contents(
                text,
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
                by_step=dataset.train.by_step,
                own=frozenset(method.state.own & method.state.vectors.keys()),
                data=identity.table(),
                characters=dataset.train.characters,
                names=labels or dataset.train.names,
                columns=dataset.train.columns,
                spaces={name: space.layout for name, space in method.state.spaces.items()},
            )
            tracked = Run(out, {**used_settings(config), "ranks": world.size}, config.run.track_dir)
            trackers = stack.enter_context(Trackers(config.run.track if world.rank == 0 else (), tracked, tell))
            loop = Loop(control, method, dataset, config, out, console, contents, folder, signals, trackers, path != "")
            notes = loop.resume(Path(found)) if found else []
            # Up to here any rank may refuse the start, and nothing is changed.
            control.wait_for_all()
            if folder is not None and loop.progress.step < loop.total:
                step, damaged = loop.progress.step if found else -1, config.run.resume == "auto"
                with control.flight.task("beginning the run directory"):
                    folder.begin(text, loop.progress.rows, step, damaged=damaged)
                with control.flight.task("writing for --track"):
                    trackers.start(loop.progress.rows)
            for note in notes:
                tell(note)
            left = 0 if loop.best.due(loop.progress.rows) else max(0, loop.total - loop.progress.step)
            if left:
                tell(begun(left, config.run.epochs, world.size, f"kill -USR1 {process_number()}" if ends else "Ctrl-C"))
            if path:
                tell(f"run directory {path}")
            done = loop.run()
            trackers.close("done" if done else "stopped")
            # A launcher may kill the others when the first one ends with status 85, and rank 0 may still write.
            control.wait_for_all()
            if take is not None:
                take(loop, contents)
            method.close()
            if config.parallel.convolution != "own":
                chosen: dict[str, str] = {}
                for told in control.collect_texts("\n".join(ops.choices), most=10_000):
                    for line in told.splitlines():
                        # Where ranks have the same sizes, the first one speaks for them.
                        chosen.setdefault(line.partition(":")[0], line)
                for line in chosen.values():
                    tell(line)
            # In Python what follows is not a command.
            for line in (
                ()
                if take is not None
                else (
                    ended(
                        config,
                        loop.progress,
                        loop.report.rows(loop.progress),
                        loop.report.share,
                        again,
                        loop.best.due(loop.progress.rows),
                    )
                    if done
                    else stopped(config, loop.progress, signals.name, again)
                )
            ):
                console.tell(line)
    return done


def _telling(console: Screen, config: Config) -> Callable[[str], None]:
    """A function that prints lines; under --quiet warnings alone."""

    def tell(text: str) -> None:
        if not config.terminal.quiet or text.lower().startswith("warning"):
            console.tell(text)

    return tell


def _again(size: int, command: str, all_ranks: bool, words: list[str]) -> str:
    """The words that start a command, on all ranks or on one."""
    from psmpi.command import typed

    return typed(command, words, size if all_ranks else 1)


if __name__ == "__main__":
    sys.exit(main())
