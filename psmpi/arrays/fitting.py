"""Training on arrays: the command line's road, with keywords for options, errors raised and nothing printed."""

from __future__ import annotations

import json
import os
import signal
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy.typing as npt

from psmpi.arrays.fitted import Fitted, fitted
from psmpi.arrays.settings import check_names, configured, raised
from psmpi.checkpoint import Contents
from psmpi.comm import world as mpi
from psmpi.comm.control import Control
from psmpi.comm.failure import Failures
from psmpi.comm.watch.flight import recorded
from psmpi.config import Config, check, from_toml, to_toml
from psmpi.data import Dataset, given_dataset, task_of
from psmpi.errors import UserError
from psmpi.output import Screen
from psmpi.registry import DEFAULT, WHOLE, find_method
from psmpi.train import settle_paths, train
from psmpi.training.checks import check_data
from psmpi.training.loop import Loop
from psmpi.training.resume import noting
from psmpi.training.start import network_of
from psmpi.training.usual import usual
from psmpi.training.whole import whole_weights

Array = npt.NDArray[Any]
# x, y, x_test, y_test, lengths, lengths_test.
Arrays = tuple[Any, Any, Any, Any, Any, Any]


@dataclass(frozen=True, eq=False)
class Training:
    """A finished training.

    network: predicts. metrics: a row an epoch, as in metrics.jsonl. folder: the run directory, None without `out`.
    notes: what the command line would have said: notes and warnings.
    """

    network: Fitted
    metrics: tuple[dict[str, Any], ...] = field(repr=False)
    folder: Path | None = None
    notes: tuple[str, ...] = field(default=(), repr=False)

    @property
    def scores(self) -> dict[str, float]:
        """The losses and scores of the last epoch by name: train_loss, test_loss, test_accuracy or test_rmse, ..."""
        row = self.metrics[-1] if self.metrics else {}
        return {name: value for name, value in row.items() if name.startswith(("test_", "train_loss"))}

    def predict(self, x: Any, lengths: Any = None, **options: Any) -> Array:
        """Predictions of the network, see `Fitted.predict`."""
        return self.network.predict(x, lengths, **options)


class Listening(Screen):
    """A screen that keeps the lines of a run in `lines`, and prints them unless it is quiet."""

    def __init__(self, *, quiet: bool) -> None:
        super().__init__(quiet=quiet, goes_on="training goes on")
        self.lines: list[str] = []

    def tell(self, text: str, style: str | None = None) -> None:
        self.lines.append(text)
        super().tell(text, style)

    @property
    def notes(self) -> tuple[str, ...]:
        """The notes and warnings among the lines."""
        return tuple(line for line in self.lines if line.lower().startswith(("note:", "warning:")))


def fit(
    x: Any,
    y: Any,
    x_test: Any = None,
    y_test: Any = None,
    *,
    model: str | None = None,
    widths: tuple[int, ...] | list[int] | None = None,
    method: str | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    seed: int | None = None,
    out: str | PathLike[str] | None = None,
    lengths: Any = None,
    lengths_test: Any = None,
    verbose: bool = False,
    **settings: Any,
) -> Training:
    """Train a network on samples x with targets y; under mpirun on all ranks, which call it with the same arrays.

    x: (n, features), or images (n, height, width) or (n, channels, height, width), uint8 (0..255, divided by 255),
    other integers or floats; or a SciPy sparse matrix; with lengths (n,) sequences (n, steps, features), or tokens (n,
    steps). y (n,): integers, booleans or strings are labels, floating point numbers values, also (n, outputs). Without
    x_test and y_test a fifth of the samples is held out for testing. model: mlp if not given. method: if not given
    one that trains the network on any number of ranks. out: a run directory, with checkpoints; without it nothing is
    written. settings: all other options of `psmpi train`, such as optimizer or weight_decay.

    Raises UserError on all ranks, or ends the job where only some ranks meet an error, and KeyboardInterrupt after the
    step under way, when all is saved in `out`; other signals do after that what they did before.
    """
    keywords = {"model": model, "widths": widths, "method": method, "epochs": epochs, "batch_size": batch_size,
                "lr": lr, "seed": seed, "out": out}  # fmt: skip
    said = {name: value for name, value in keywords.items() if value is not None} | settings
    with raised(), _as_before():
        early: list[str] = []
        world = recorded(mpi.start(early.append))
        screen = Listening(quiet=not verbose or world.rank != 0)
        for line in early:
            screen.tell(line.removeprefix("psmpi: "))
        control = Control(world)
        with Failures(world):
            return _fit(world, control, (x, y, x_test, y_test, lengths, lengths_test), said, screen)


def _fit(world: Any, control: Control, arrays: Arrays, said: Mapping[str, Any], screen: Listening) -> Training:
    control.agreed(lambda: check_names(said))
    _check_same(control, said)
    task = control.agreed(lambda: task_of(arrays[1])) or ""
    config, own = _shared(control, lambda: configured(said, task))
    check_data(config.data, False)
    data = (config.data.split_seed, config.data.layout == "nhwc", config.data.validation)
    opened = control.agreed(lambda: given_dataset(*arrays, *data))
    assert opened is not None
    dataset, classes = opened[0].for_training(), opened[1]
    config, own = _shared(control, lambda: (_settled(config, own, said, dataset, screen), own))
    stopped: list[str] = []
    found: list[Training] = []

    def take(loop: Loop, contents: Contents) -> None:
        stopped.append(loop.signals.name)
        loop.method.collect()
        vector = whole_weights(control, loop.writer.weights, loop.method.state.vectors["weights"])
        done = replace(contents, progress=loop.progress, scalars=dict(loop.method.scalars))
        network = fitted(done, vector, classes)
        folder = Path(loop.config.run.out) if loop.config.run.out else None
        found.append(Training(network, loop.rows, folder, screen.notes))

    # Names as they are typed: a checkpoint gives numbers back as numbers.
    typed = classes is not None and classes.dtype.kind in "biuf" and bool(dataset.train.names)
    labels = tuple(classes.tolist()) if typed and classes is not None else ()
    done = train(world, control, config, own, "", "", given=dataset, labels=labels, screen=screen, take=take)
    if not done:
        _stop(stopped[0], config.run.out)
    return found[0]


def _shared(control: Control, work: Callable[[], tuple[Config, str]]) -> tuple[Config, str]:
    """Rank 0's result on all ranks: a configuration, and the path of a run's own settings."""

    def told() -> tuple[str, str]:
        config, own = work()
        return to_toml(config), own

    text, own = json.loads(control.share(json.dumps(control.agreed(told if control.rank == 0 else None))))
    return from_toml(text, "configuration"), own


def _settled(config: Config, own: str, said: Mapping[str, Any], dataset: Dataset, screen: Screen) -> Config:
    """The configuration, checked, with all that the arrays say; own: where settings are from that are not `said`."""
    if find_method(config.parallel.method).private(config):
        raise UserError("--private-data is of data sets in files: leave it out, or train with psmpi train")
    if config.run.track and not config.run.out:
        raise UserError("--track needs --out, the run directory whose metrics it passes on")
    with noting(own):
        made = usual(settle_paths(config, screen.tell, said.keys()), screen.tell, dataset)
        return made if own else _with_method(made, said, dataset)


def _with_method(config: Config, said: Mapping[str, Any], dataset: Dataset) -> Config:
    """The configuration with a method for its network on any ranks, where none is named nor one by its settings."""
    of_default = {one.name for kind in find_method(DEFAULT).settings for one in fields(kind)}
    if "method" in said or of_default & said.keys() or network_of(config, dataset).tie() is None:
        return config
    made = replace(config, parallel=replace(config.parallel, method=WHOLE))
    check(made, said.keys())
    return made


def _check_same(control: Control, said: Mapping[str, Any]) -> None:
    """UserError on all ranks where they call with other settings than rank 0."""
    own = repr(sorted(said.items(), key=lambda item: item[0]))
    first = control.share(own)

    def check() -> None:
        if own != first:
            raise UserError(
                f"rank {control.rank} calls psmpi.fit with other settings than rank 0, {own} and {first}: all ranks "
                "make the same call"
            )

    control.agreed(check)


def _stop(name: str, out: str) -> None:
    """Let the signal that has stopped the training do what it did before; without one it was another rank's."""
    saved = f"; the run is saved: go on with resume='auto', out={out!r}" if out else ""
    if name and name != "SIGINT":
        os.kill(os.getpid(), signal.Signals[name])
    raise KeyboardInterrupt(f"the training was stopped{saved}")


@contextmanager
def _as_before() -> Iterator[None]:
    """A block after which the process has the environment, the filters of warnings and the cores that it had before."""
    environment = dict(os.environ)
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        stack.callback(_restore, environment)
        if cores is not None:
            stack.callback(_use, cores)
        yield


def _restore(environment: Mapping[str, str]) -> None:
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    for name, value in environment.items():
        if os.environ.get(name) != value:
            os.environ[name] = value


def _use(cores: set[int]) -> None:
    if os.sched_getaffinity(0) != cores:
        os.sched_setaffinity(0, cores)
