"""Resuming a checkpoint: its settings, the comparison of the data, and the restored state of the method."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from psmpi import checkpoint
from psmpi.checkpoint import Contents
from psmpi.comm.watch.flight import flight_of
from psmpi.config import Config, changes, from_toml, read_file, without_anew
from psmpi.data import Dataset, Identity, differences
from psmpi.data.names import listed
from psmpi.errors import UserError, counted, expanded
from psmpi.nn.layers.pattern_file import brief
from psmpi.training.folder import CONFIG
from psmpi.training.method import Method


class Base(NamedTuple):
    """The settings of a resumed run, and their path: of the checkpoint, or of config.toml if there is none."""

    config: Config
    path: str


def own_settings(resume: str, out: str) -> Base | None:
    """The settings of the run that --resume names; None for a fresh start.

    They are those of the checkpoint, or of config.toml in a run directory without checkpoints. UserError: see
    `psmpi.checkpoint.find`.
    """
    if not resume:
        return None
    folder = expanded(out, "--out")
    path = checkpoint.find(resume if resume == "auto" else str(expanded(resume, "--resume")), folder, lambda _: None)
    if path is not None:
        config = from_toml(checkpoint.read_contents(path).config, str(path), foreign=True)
    elif out and (folder / CONFIG).is_file():
        path = folder / CONFIG
        config = read_file(str(path))
    else:
        return None
    # Files must not name other files to read or write.
    config = without_anew(config)
    return Base(replace(config, run=replace(config.run, out=out, resume=resume, max_steps=0)), str(path))


@contextmanager
def noting(own: str) -> Iterator[None]:
    """Add to UserErrors of the block that settings which are not given come from the file `own`."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{error} (settings that are not given are those in {own})" if own else str(error)) from None


def compare(
    contents: Contents, config: Config, dataset: Dataset, data: Identity, path: str, tell: Callable[[str], None]
) -> None:
    """Print the settings that differ from a checkpoint's. UserError for a difference that cannot be resumed.

    Such are other data without --new-data, and inside an epoch another order of the samples.
    """
    saved, progress = from_toml(contents.config, path, foreign=True), contents.progress
    if contents.task != data.task:
        means = {"classes": "labels", "regression": "values"}
        raise UserError(
            f"checkpoint {path} has learnt {means[contents.task]}, and the targets of --dataset {config.data.dataset} "
            f"are {means[data.task]}: use the data set it was made with, or start afresh without --resume"
        )
    inside = f" (it is {counted(progress.cursor, 'step')} into epoch {progress.epoch + 1})" if progress.cursor else ""
    differing = []
    if contents.data:
        differing = differences(Identity.of(contents.data), data)
    elif contents.random.get("samples", data.train.samples) != data.train.samples:
        # Checkpoints without /data state the number of samples alone.
        differing = [f"{contents.random['samples']:,} training samples, there {data.train.samples:,}"]
    seeds = (saved.data.split_seed, config.data.split_seed)
    if len(set(seeds)) > 1 and dataset.held_out and (differing or not contents.data) and not config.run.new_data:
        raise UserError(
            f"checkpoint {path} was made with --split-seed {seeds[0]}: with {seeds[1]} it would be tested on samples "
            "that it was trained on; use the same"
        )
    if differing and not (config.run.new_data and not progress.cursor):
        fix = f"an epoch is to be ended with the same data{inside}" if config.run.new_data else "use the same data set"
        more = "" if progress.cursor else ", or add --new-data to go on with the other one"
        raise UserError(
            f"--dataset {config.data.dataset} is not the data set that checkpoint {path} was made with: in the "
            f"checkpoint {'; '.join(differing)}: {fix}{more}"
        )
    numbered = Identity.of(contents.data).numbering if contents.data else None
    if numbered is not None and (data.numbering is None or data.numbering[:2] != numbered[:2]):
        raise UserError(
            f"checkpoint {path} is of a text whose labels and features are numbered otherwise than those of --dataset "
            f"{config.data.dataset} ({'; '.join(differing)}): --new-data goes on with a text that numbers them alike"
        )
    if contents.characters and dataset.train.characters != contents.characters:
        raise UserError(
            f"checkpoint {path} is of a text of {len(contents.characters)} characters, and --dataset "
            f"{config.data.dataset} has others: --new-data goes on with a text that has exactly the same ones"
        )
    if contents.called != dataset.train.names and contents.data:
        raise UserError(
            f"checkpoint {path} is of the classes {listed(contents.called) or 'by number'}, and --dataset "
            f"{config.data.dataset} has {listed(dataset.train.names) or 'classes by number'}: --new-data goes on with "
            "samples of exactly the same ones"
        )
    for difference in differing:
        tell(f"note: other data than in the checkpoint: {difference}")
    if differing and dataset.held_out:
        tell(
            "warning: the test samples are drawn from these other data, and some may be ones that were trained on: "
            "save those to test on as x_test and y_test"
        )
    fixed = [
        ("--batch-size", saved.data.batch_size, config.data.batch_size),
        ("--seed", saved.run.seed, config.run.seed),
        ("--shuffle", saved.data.shuffle, config.data.shuffle),
    ]
    for option, before, now in fixed if progress.cursor else ():
        if before != now:
            raise UserError(
                f"checkpoint {path} was made with {option} {before}: its place among the minibatches{inside} has no "
                f"meaning with {now}; use the same up to the end of the epoch"
            )
    for name, before, now in changes(saved, config):
        if name == "split_seed":
            # If it matters, the data differ, which is printed above.
            continue
        tell(f"note: {name} is {brief(now)}, in the checkpoint it was {brief(before)}")


def restore(method: Method, path: Path, contents: Contents, config: Config, steps_per_epoch: int) -> list[str]:
    """Fill a method's state from a checkpoint of any method and optimizer; returns notes for the user.

    Weights are always restored; vectors of the optimizer, if the checkpoint has the same ones; the method's own vectors
    as far as the checkpoint has them. UserError for scalars out of their range.
    """
    state = method.state
    # Values that the checkpoint does not have stay as they are.
    method.collect()
    vectors, reason = state.vectors, ""
    saved: str = from_toml(contents.config, str(path), foreign=True).optimization.optimizer
    if saved != config.optimization.optimizer:
        reason = f"the checkpoint is of {saved}, not of {config.optimization.optimizer}"
    else:
        declared, stored = vectors.keys() - {"weights"} - state.own, contents.vectors - contents.own
        if declared != stored:
            has, want = (" ".join(sorted(names)) or "no vectors" for names in (stored, declared))
            reason = f"the checkpoint's optimizer has {has}, these settings have {want}"
    there = {"weights"} if reason else contents.vectors | {"weights"}
    taken = {name: vector for name, vector in vectors.items() if name in there}
    try:
        state.update(contents.scalars, state.own if reason else state.scalars.keys())
    except ValueError as error:
        raise UserError(f"checkpoint {path}, scalars: {error}; use another one") from None
    spaces = {
        name: space
        for name, space in state.spaces.items()
        if contents.spaces.get(name) == space.layout and not (reason and space.of_optimizer)
    }
    fresh = (vectors.keys() - taken.keys()) | (state.spaces.keys() - spaces.keys())
    tables = not reason and state.rows.total > 0
    with flight_of(method.context.world).task(f"reading the checkpoint {path}"):
        checkpoint.load(path, method.layout, method.shards[method.rank], taken, contents.part)
        for name, space in spaces.items():
            checkpoint.load_space(path, name, space.layout, space.owned[method.rank], space.saved)
        loaded = tables and checkpoint.load_tables(path, state.tables, state.rows, method.rank)
    if "steps" in state.scalars:
        # Steps count those of this data set's epochs, whichever method wrote the checkpoint.
        state.scalars["steps"] = contents.progress.epoch * steps_per_epoch + contents.progress.cursor
    state.restore()
    method.restored(loaded, fresh)
    lost = [
        f"the checkpoint does not hold {one}"
        for one in dict.fromkeys(space.not_restored for name, space in state.spaces.items() if name in fresh)
    ]
    if reason:
        return [f"{reason}: the optimizer starts afresh", *lost]
    new = sorted(fresh - state.spaces.keys())
    notes = [f"the checkpoint has no {' '.join(new)}: these start afresh"] if new else []
    notes += [f"the checkpoint does not hold {state.not_restored}"] if tables and not loaded else []
    return [*notes, *lost]
