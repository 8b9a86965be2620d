"""The start of a run: checks by rank 0 before the other ranks begin, and the agreement of all ranks on the data."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from psmpi import checkpoint
from psmpi.data import (
    Dataset,
    Identity,
    Prints,
    alike,
    card,
    check_same,
    find_doubts,
    identify,
    of_rank,
    open_dataset,
    together,
)
from psmpi.data.augmented import with_augmentation
from psmpi.data.bounded import bytes_of, with_memory
from psmpi.data.compressed import Compressed
from psmpi.data.compressed_rows import CompressedRows
from psmpi.data.describe import describe
from psmpi.data.rows import ArrayRows, RowSource
from psmpi.errors import UserError, layers_in
from psmpi.files.examiner import examined
from psmpi.nn.zoo import make_network
from psmpi.registry import find_method
from psmpi.training.best import check_monitor
from psmpi.training.checks import check_margin, check_sequences, notes
from psmpi.training.class_weights import check_class_weights
from psmpi.training.folder import RunFolder
from psmpi.training.loop import plan_steps
from psmpi.training.resume import compare, noting

if TYPE_CHECKING:
    from psmpi.comm.control import Control
    from psmpi.comm.watch.flight import Flight
    from psmpi.config import Config


class Start(NamedTuple):
    """The results of the checks of rank 0."""

    dataset: Dataset
    identity: Identity
    # The run directory, if it existed before.
    folder: RunFolder | None
    # The path of the checkpoint to resume, or "".
    checkpoint: str


def begin(
    control: Control, config: Config, own: str, tell: Callable[[str], None], layers: str, given: Dataset | None = None
) -> Start:
    """Check files and settings on rank 0 alone, and lock an existing run directory. UserError for the first fault.

    own: path of the file with the run's own settings; layers: path of the file that describes the layers; given: the
    data set, if it is in memory.
    """
    kind: Any = find_method(config.parallel.method)
    run, size = config.run, control.size
    prints: list[Prints] = []
    dataset, identity = _open(control, config, prints=prints, given=given)
    with control.flight.task(f"opening the run directory {run.out}"):
        folder, checkpoint_path = RunFolder(Path(run.out), tell) if run.out and Path(run.out).exists() else None, ""
    try:
        if run.resume:
            with control.flight.task(f"looking for the checkpoint {run.resume} of {run.out}"):
                checkpoint_path = str(checkpoint.find(run.resume, Path(run.out), tell) or "")
        if run.resume == "auto" and checkpoint_path != own and (checkpoint_path or not own.endswith(".toml")):
            raise UserError(
                f"--out {run.out}: another run wrote {checkpoint_path} there while this one waited: start "
                "this one again, to go on with the settings of that one"
            )
        if checkpoint_path:
            with control.flight.task(f"reading the checkpoint {checkpoint_path}"):
                contents = checkpoint.read_contents(Path(checkpoint_path))
            if not kind.private(config):
                compare(contents, config, dataset, identity, checkpoint_path, tell)
        elif run.resume == "auto":
            tell(f"note: there is no checkpoint in {run.out}: this is a fresh start")
        if folder is not None:
            folder.check(Path(checkpoint_path) if checkpoint_path else None)
        with layers_in(layers):
            network = network_of(config, dataset)
        with noting(own):
            check_margin(network, dataset, config)
            check_sequences(kind, network, dataset)
            check_class_weights(kind, dataset, config)
            kind.check(size, network, dataset, config)
            if not kind.private(config):
                plan_steps(dataset, config)
        for note in (*notes(size, network, dataset, config.data.batch_size), *kind.notes(size, network, config)):
            tell(f"note: {note}")
        # Rank 0 has a part of private data sets only, of which doubts would say nothing.
        doubts = () if kind.private(config) else find_doubts(dataset, prints)
        if not kind.private(config):
            tell(describe(dataset))
        for warning in (*kind.warnings(size, network, config), *check_monitor(config, dataset), *doubts):
            tell(f"warning: {warning}")
    except BaseException:
        if folder is not None:
            folder.close()
        raise
    return Start(dataset, identity, folder, checkpoint_path)


def share_path(control: Control, path: str) -> str:
    """Send rank 0's path to all ranks; names of files need not be UTF-8."""
    shared: str = json.loads(control.share(json.dumps(path)))
    return shared


def agree(
    control: Control,
    config: Config,
    start: Start | None,
    share: tuple[int, int],
    tell: Callable[[str], None],
    given: Dataset | None = None,
) -> tuple[Dataset, Identity]:
    """Open the data set and compare its identity over all ranks. UserError if it differs.

    share: this rank's number on its host, and the number of ranks there, which compare the samples between them; given:
    see `begin`. Private data sets are joined; tell: prints how they differ from those of the checkpoint.
    """
    if find_method(config.parallel.method).private(config):
        return _agree_private(control, config, start, tell)
    if start is not None:
        dataset, identity = start.dataset, start.identity
    else:
        dataset, identity = _open(control, config, share, given=given)
    texts = control.collect_texts(json.dumps([socket.gethostname(), identity.table()]), most=4000)
    everyone = dict(enumerate(map(json.loads, texts)))
    named = {f"rank {rank}, host {at}": Identity.of(of) for rank, (at, of) in everyone.items()}
    control.agreed(lambda: check_same(identity, named))
    return dataset, identity


def _agree_private(
    control: Control, config: Config, start: Start | None, tell: Callable[[str], None]
) -> tuple[Dataset, Identity]:
    """Join the private data sets of all ranks, see psmpi.data.private."""
    dataset, identity = (start.dataset, start.identity) if start is not None else _open(control, config)
    cards = control.collect_texts(card(identity), most=4000)
    if start is not None:
        # The other ranks wait, so that rank 0 alone reports errors.
        whole, everyone = together(dataset, cards, 0)
        if start.checkpoint:
            contents = checkpoint.read_contents(Path(start.checkpoint))
            compare(contents, config, whole, everyone, start.checkpoint, tell)
        kind: Any = find_method(config.parallel.method)
        kind.check(control.size, network_of(config, whole), whole, config)
        plan_steps(whole, config)
        same = alike(cards)
        if same is not None:
            tell(
                f"warning: ranks {same[0]} and {same[1]} have the same training samples, which count twice: with "
                "--private-data each rank opens a file of its own, for instance --dataset 'own-{rank}.npz'"
            )
    cards = json.loads(control.share(json.dumps(cards)))
    return together(dataset, cards, control.rank)


def _open(
    control: Control,
    config: Config,
    share: tuple[int, int] = (0, 1),
    prints: list[Prints] | None = None,
    given: Dataset | None = None,
) -> tuple[Dataset, Identity]:
    """Open the data set and identify it; the flight recorder records its reads, now and later.

    share, prints: see `identify`; given: see `begin`.
    """
    if given is not None:
        if config.data.augment:
            given = with_augmentation(given, config.data.augment, config.run.seed)
        return given, identify(given, share, prints)
    with control.flight.task(f"reading the data set {config.data.dataset}"):
        name = of_rank(config.data.dataset, control.rank)
        # Names of classes would be numbered differently on ranks with data of their own.
        names = () if find_method(config.parallel.method).private(config) else None
        # The first rank of a host has another process examine the file.
        with examined("not") if share[0] else nullcontext():
            dataset = open_dataset(*replace(config.data, dataset=name).source, names=names).for_training()
        if config.data.augment:
            dataset = with_augmentation(dataset, config.data.augment, config.run.seed)
        if config.data.data_memory:
            dataset = with_memory(dataset, bytes_of(config.data.data_memory))
        return _recorded(dataset, control), identify(dataset, share, prints)


def _recorded(dataset: Dataset, control: Control) -> Dataset:
    """The data set with sources whose reads from files are recorded."""
    if control.size == 1:
        return dataset
    train, test = (
        split
        if isinstance(split.source, (ArrayRows, CompressedRows))
        else replace(split, source=RecordedRows(split.source, control.flight))
        for split in (dataset.train, dataset.test)
    )
    return replace(dataset, train=train, test=test)


class RecordedRows:
    """A source of samples whose reads the flight recorder records."""

    def __init__(self, source: RowSource, flight: Flight):
        self.source, self.flight = source, flight
        self.name = f"reading samples from {getattr(source, 'path', 'the files of the data set')}"

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    @property
    def n(self) -> int:
        return self.source.n

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.source.dtype

    @property
    def card(self) -> bytes | None:
        return self.source.card

    def read_into(self, rows: npt.NDArray[np.int64], where: npt.NDArray[np.int64], out: npt.NDArray[Any]) -> None:
        with self.flight.task(self.name):
            self.source.read_into(rows, where, out)

    def glance(self, count: int) -> npt.NDArray[Any]:
        with self.flight.task(self.name):
            return self.source.glance(count)

    def taken(self, rows: npt.NDArray[np.int64]) -> Compressed | None:
        return self.source.taken(rows)


def network_of(config: Config, dataset: Dataset) -> Any:
    """The configured network, for the shape of the data set."""
    model = config.model
    return make_network(
        model.model, dataset.shape, dataset.outputs, **model.shape, by_step=dataset.train.by_step, task=dataset.task
    )
