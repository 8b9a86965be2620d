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

# Exit status of a run that a signal stopped and that can be resumed.
GO_ON = 85


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 done, 1 error, 85 stopped by a signal and saved."""
    from psmpi.comm.world import run
    from psmpi.command import answer_help
    from psmpi.config.help import wants_help

    words = sys.argv[1:] if argv is None else argv
    return answer_help(lambda: parse(words)) if wants_help(words) else run(lambda: _main(words))


def parse(argv: list[str]) -> Config:
    """The configuration: defaults or the settings of the resumed run, then the TOML file, then the command line.

    Raises SystemExit as argparse does.
    """
    return _parse(argv)[0]


def _parse(argv: list[str]) -> tuple[Config, str]:
    """The configuration, and the path of the file with the settings of the resumed run; "" for a new run."""
    from dataclasses import replace

    from psmpi.command import training_options
    from psmpi.config import defaults, given, given_names
    from psmpi.config.carried import with_names, with_usual, without_unused
    from psmpi.training.resume import own_settings

    start = defaults(argv)
    option_names = given_names(argv)
    words = with_usual(argv, start)
    base = own_settings(given(argv, "--resume") or start.run.resume, given(argv, "--out") or start.run.out)
    if base is not None:
        # The method, loss or optimizer of the resumed run may not be installed here.
        own = with_names(base.config, argv)
        if "data_dir" in option_names and Path(own.data.dataset).is_absolute():
            # The data set's file may have moved to --data-dir.
            own = replace(own, data=replace(own.data, dataset=Path(own.data.dataset).name))
        start = defaults(argv, own)
    config = training_options(
        start, words, given(argv, "--method") or (start.parallel.method if "method" in option_names else "")
    )
    if base is None and config.optimization.optimizer != start.optimization.optimizer:
        # The learning rate in a TOML file belongs to the optimizer in that file.
        return without_unused(config, start, given_names(argv, file=False)), ""
    return (config, "") if base is None else (without_unused(config, base.config, option_names), base.path)


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
    """Read and check the command line on rank 0, so that help and errors appear once; share the result.

    Returns the configuration, or None after help or an error; the exit status in that case; the paths of the resumed
    run's own settings and of the file that describes the layers, "" for none; the note about the usual numbers.
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


def settle_paths(config: Config, tell: Callable[[str], None], option_names: Collection[str]) -> Config:
    """Make the checks that need no MPI; return the configuration with paths that later runs can use too.

    option_names: names of the given settings, see psmpi.config.check. The data set `psmpi.data.ARRAYS` has no path.
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

    check(config, option_names)
    run, data = config.run, config.data
    check_trackers(run.track, run.track_dir)
    if run.checkpoint_parallel and not checkpoint.supported():
        raise UserError(
            "--checkpoint-parallel: this h5py has no parallel HDF5; build one (HDF5_MPI=ON CC=mpicc pip install "
            "--no-binary=h5py h5py), or leave the option out"
        )
    if run.new_data and not run.resume:
        raise UserError("--new-data resumes a checkpoint with other data: add --resume, or leave it out")
    out, resume = (str(expanded(p, of)) if p else "" for p, of in ((run.out, "--out"), (run.resume, "--resume")))
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
    # Put the sparsity patterns of layers into the configuration: a checkpoint keeps the configuration only.
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
    """Train; return True if all is done, False if a signal stopped it. own, layers, numbers: as from `_configure`.

    given: the data set, if it is in memory; labels: names of its classes; screen: prints the lines. take: called on all
    ranks at the end as take(loop, contents); with it, a run directory is written only if the configuration names one.
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
        # These handlers of signals replace MPI's own, so they are installed after MPI's start.
        launched, ends = announced_size(os.environ) is not None, ends_ranks(os.environ)
        signals = StopSignals(
            config.run.save_signal,
            "" if world.rank or take is not None else STOPPING,
            shown_on(2) if ends else "",
            # A person sends a signal once; a launcher or a batch system may send it twice.
            None if launched or "SLURM_JOB_ID" in os.environ else 0.2,
            take is None or world.size > 1,
        )
        stack.enter_context(signals)
        watch = stack.enter_context(watched(control, config.run.stall_warn, config.run.stall_abort))
        start = control.agreed((lambda: begin(control, config, own, tell, layers, given)) if world.rank == 0 else None)
        folder = stack.enter_context(start.folder) if start is not None and start.folder is not None else None
        # An absolute path, since ranks may have been started in different folders.
        origin = start.checkpoint if start is not None else ""
        origin = share_path(control, str(Path(origin).absolute()) if origin else "")
        ranks, cores = host(world)
        dataset, identity = agree(control, config, start, (local_rank(world), ranks), tell, given)
        # No more files will be examined.
        examiner.close()
        network = network_of(config, dataset)
        if start is not None:
            origin = start.checkpoint
            stem = f"{Path(config.data.dataset).stem}-{config.model.model}"

            def make() -> RunFolder:
                with control.flight.task("making the run directory"):
                    return RunFolder(Path(config.run.out), tell) if config.run.out else RunFolder.unnamed(stem, tell)

        wanted = start is not None and folder is None and bool(config.run.out or take is None)
        new_folder = control.agreed(make if wanted else None)
        folder = stack.enter_context(new_folder) if new_folder is not None else folder
        path = share_path(control, str(folder.path) if folder is not None else "")
        out = Path(path)
        config = replace(config, run=replace(config.run, out=path))
        again = partial(_again, world.size)
        if signals.message:
            signals.message = at_signal(str(out), ends, again)
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
        # Code that needs finite numbers checks them; a diverging run prints one message.
        with threadpool_limits(threads), np.errstate(all="ignore"):
            ops = backend_of(world, config, threads, tell)
            # Arrays on a device take no memory of the host.
            check_capacity(control, kind, network, dataset, config, [] if ops.on_device else limits())
            method = kind(Context(world, network, dataset, config, ops))
            settle(world, own_cores(), method.place().held > 0)
            place = json.dumps([socket.gethostname(), *vars(method.place()).values()])
            places = [json.loads(text) for text in control.collect_texts(place)]
            if not config.terminal.quiet:
                show_places(console, [(rank, host, Place(*rest)) for rank, (host, *rest) in enumerate(places)])
            if config.terminal.verbose:
                sizes = ", ".join(f"{what} {count / 1e6:.3g}" for what, count in method.memory().items())
                tell(f"memory of rank 0 in MB: {sizes}")
            tell(f"model {network.name}: {method.layout.size:,} parameters; backend {ops.description}")
            for line in method.run_notes():
                tell(line)
            method_settings = {k: v for section in config.chosen.values() for k, v in asdict(section).items()}
            # Settings that each start gives anew are not part of the run.
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
            notes = loop.resume(Path(origin)) if origin else []
            # Any rank may refuse the start up to here; files of a run directory change only afterwards.
            control.wait_for_all()
            if folder is not None and loop.progress.step < loop.total:
                step, damaged = loop.progress.step if origin else -1, config.run.resume == "auto"
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
            finished = loop.run()
            trackers.close("done" if finished else "stopped")
            # A launcher may kill all ranks when the first one ends with status 85, and rank 0 may still be writing.
            control.wait_for_all()
            if take is not None:
                take(loop, contents)
            method.close()
            if config.parallel.convolution != "own":
                chosen: dict[str, str] = {}
                for lines in control.collect_texts("\n".join(ops.choices), most=10_000):
                    for line in lines.splitlines():
                        # Print one line for ranks with the same sizes, that of the first rank.
                        chosen.setdefault(line.partition(":")[0], line)
                for line in chosen.values():
                    tell(line)
            # Lines about the next command to type are not for Python.
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
                    if finished
                    else stopped(config, loop.progress, signals.name, again)
                )
            ):
                console.tell(line)
    return finished


def _telling(console: Screen, config: Config) -> Callable[[str], None]:
    """Return a function that prints lines; with --quiet it prints only warnings."""

    def tell(text: str) -> None:
        if not config.terminal.quiet or text.lower().startswith("warning"):
            console.tell(text)

    return tell


def _again(size: int, command: str, all_ranks: bool, words: list[str]) -> str:
    """A command line that starts `command` on all `size` ranks or on one."""
    from psmpi.command import typed

    return typed(command, words, size if all_ranks else 1)


if __name__ == "__main__":
    sys.exit(main())
