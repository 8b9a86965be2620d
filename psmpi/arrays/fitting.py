"""Training on arrays: `fit` trains as the command line does, takes keywords for options, and raises errors."""

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
# The arrays x, y, x_test, y_test, lengths and lengths_test.
Arrays = tuple[Any, Any, Any, Any, Any, Any]


@dataclass(frozen=True, eq=False)
class Training:
    """A finished training.

    network: the trained network. metrics: one row for each epoch, as in metrics.jsonl. folder: the run directory, None
    without `out`. notes: the notes and warnings that the command line would have printed.
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
        """Predictions of the network for samples x, see `Fitted.predict`."""
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
    """Train a network on samples x with targets y. Under mpirun all ranks call it with the same arrays.

    x: samples (n, features), or images (n, height, width) or (n, channels, height, width); uint8 (0..255, divided by
    255), other integers or floats; or a SciPy sparse matrix. With lengths (n,), x is sequences (n, steps, features) or
    tokens (n, steps). y: (n,); integers, booleans and strings are labels, floating point numbers are values, which may
    also be (n, outputs). Without x_test and y_test, a fifth of the samples is held out for testing. model: mlp if not
    given. method: if not given, one that trains the network on any number of ranks. out: a run directory with
    checkpoints; without it no files are written. settings: all other options of `psmpi train`, such as optimizer or
    weight_decay. verbose: print the lines of the training on rank 0.

    UserError, for settings and arrays that do not fit, is raised on all ranks; an error on some ranks only ends the
    job. Ctrl-C raises KeyboardInterrupt after the current step, when the run is saved in `out`. After another signal
    the run is saved too, and the signal then has the effect that it had before `fit`.
    """
    keywords = {"model": model, "widths": widths, "method": method, "epochs": epochs, "batch_size": batch_size,
                "lr": lr, "seed": seed, "out": out}  # fmt: skip
    given_settings = {name: value for name, value in keywords.items() if value is not None} | settings
    with raised(), _as_before():
        early: list[str] = []
        world = recorded(mpi.start(early.append))
        screen = Listening(quiet=not verbose or world.rank != 0)
        for line in early:
            screen.tell(line.removeprefix("psmpi: "))
        control = Control(world)
        with Failures(world):
            return _fit(world, control, (x, y, x_test, y_test, lengths, lengths_test), given_settings, screen)


def _fit(world: Any, control: Control, arrays: Arrays, settings: Mapping[str, Any], screen: Listening) -> Training:
    control.agreed(lambda: check_names(settings))
    _check_same(control, settings)
    task = control.agreed(lambda: task_of(arrays[1])) or ""
    config, own = _shared(control, lambda: configured(settings, task))
    check_data(config.data, False)
    data = (config.data.split_seed, config.data.layout == "nhwc", config.data.validation)
    opened = control.agreed(lambda: given_dataset(*arrays, *data))
    assert opened is not None
    dataset, classes = opened[0].for_training(), opened[1]
    config, own = _shared(control, lambda: (_settled(config, own, settings, dataset, screen), own))
    stopped: list[str] = []
    trainings: list[Training] = []

    def take(loop: Loop, contents: Contents) -> None:
        stopped.append(loop.signals.name)
        loop.method.collect()
        vector = whole_weights(control, loop.writer.weights, loop.method.state.vectors["weights"])
        final = replace(contents, progress=loop.progress, scalars=dict(loop.method.scalars))
        network = fitted(final, vector, classes)
        folder = Path(loop.config.run.out) if loop.config.run.out else None
        trainings.append(Training(network, loop.rows, folder, screen.notes))

    # Labels in their own type: a checkpoint then returns numbers as numbers.
    typed = classes is not None and classes.dtype.kind in "biuf" and bool(dataset.train.names)
    labels = tuple(classes.tolist()) if typed and classes is not None else ()
    finished = train(world, control, config, own, "", "", given=dataset, labels=labels, screen=screen, take=take)
    if not finished:
        _stop(stopped[0], config.run.out)
    return trainings[0]


def _shared(control: Control, work: Callable[[], tuple[Config, str]]) -> tuple[Config, str]:
    """Call `work` on rank 0; return its configuration and path of a run's own settings on all ranks."""

    def as_text() -> tuple[str, str]:
        config, own = work()
        return to_toml(config), own

    text, own = json.loads(control.share(json.dumps(control.agreed(as_text if control.rank == 0 else None))))
    return from_toml(text, "configuration"), own


def _settled(config: Config, own: str, settings: Mapping[str, Any], dataset: Dataset, screen: Screen) -> Config:
    """Check the configuration; return it with the settings that depend on the arrays.

    own: the path of the resumed run's settings, which apply where `settings` has none; "" for a new run.
    """
    if find_method(config.parallel.method).private(config):
        raise UserError("--private-data needs data sets in files: leave it out, or train with psmpi train")
    if config.run.track and not config.run.out:
        raise UserError("--track needs --out, the run directory whose metrics it passes on")
    with noting(own):
        settled = usual(settle_paths(config, screen.tell, settings.keys()), screen.tell, dataset)
        return settled if own else _with_method(settled, settings, dataset)


def _with_method(config: Config, settings: Mapping[str, Any], dataset: Dataset) -> Config:
    """Choose the method WHOLE if the default method cannot partition the network and `settings` names no method.

    A setting of the default method names that method.
    """
    of_default = {each.name for kind in find_method(DEFAULT).settings for each in fields(kind)}
    if "method" in settings or of_default & settings.keys() or network_of(config, dataset).tie() is None:
        return config
    changed = replace(config, parallel=replace(config.parallel, method=WHOLE))
    check(changed, settings.keys())
    return changed


def _check_same(control: Control, settings: Mapping[str, Any]) -> None:
    """Raise UserError on all ranks if a rank calls with other settings than rank 0."""
    own = repr(sorted(settings.items(), key=lambda item: item[0]))
    first = control.share(own)

    def check() -> None:
        if own != first:
            raise UserError(
                f"rank {control.rank} calls psmpi.fit with other settings than rank 0, {own} and {first}: make the "
                "same call on all ranks"
            )

    control.agreed(check)


def _stop(name: str, out: str) -> None:
    """Send this process the signal `name` that stopped the training again, now with its former handler.

    SIGINT, and "" if another rank got the signal, raise KeyboardInterrupt. out: the run directory, "" for none.
    """
    saved = f"; the run is saved: go on with resume='auto', out={out!r}" if out else ""
    if name and name != "SIGINT":
        os.kill(os.getpid(), signal.Signals[name])
    raise KeyboardInterrupt(f"the training was stopped{saved}")


@contextmanager
def _as_before() -> Iterator[None]:
    """Run a block, then restore the process's environment variables, warning filters and CPU affinity."""
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
