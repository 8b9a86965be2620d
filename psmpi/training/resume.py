"""Going on from a checkpoint: with which settings and data, and which vectors, tables and scalars a method takes up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from psmpi import checkpoint
from psmpi.checkpoint import Contents
from psmpi.config import Config, changes, from_toml
from psmpi.data import DATASETS, Identity, differences
from psmpi.errors import DamagedError, UserError
from psmpi.training.folder import CONFIG
from psmpi.training.method import Method


def own_settings(resume: str, out: str) -> Config | None:
    """The settings of the run that --resume goes on with, None where it is a fresh start after all.

    Those of config.toml in the run directory, which the run was started with last; else those of the checkpoint. What
    is wrong with a checkpoint is told where it is read whole.
    """
    if not resume:
        return None
    try:
        if resume != "auto":
            path = checkpoint.newest(Path(resume).expanduser())
            checkpoint.check_file(path)
            found = from_toml(checkpoint.read_contents(path).config, str(path), foreign=True)
        elif out and (path := Path(out).expanduser() / CONFIG).is_file():
            found = _read(path)
        else:
            whole = checkpoint.find(resume, Path(out).expanduser(), lambda _: None) if out else None
            if whole is None:
                return None
            found = from_toml(checkpoint.read_contents(whole).config, str(whole), foreign=True)
    except DamagedError:
        return None
    return replace(found, run=replace(found.run, out=out, resume=resume, new_data=False, max_steps=0))


def _read(path: Path) -> Config:
    """The settings of a run directory's configuration; UserError where it is not what a run writes."""
    try:
        return from_toml(path.read_text(encoding="utf-8"), str(path), foreign=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: {error}; correct it, or remove it to go on with the settings of the checkpoint"
        ) from None


def compare(contents: Contents, config: Config, data: Identity, path: str, tell: Callable[[str], None]) -> None:
    """Tell which settings differ from those of a checkpoint; UserError where the run would not go on with the same.

    That is with other data, unless --new-data says so, and inside an epoch with another order of the samples.
    """
    saved, progress = from_toml(contents.config, path, foreign=True), contents.progress
    if contents.task != data.task:
        means = {"classes": "labels", "regression": "values"}
        raise UserError(
            f"checkpoint {path} has learnt {means[contents.task]}, and the targets of --dataset {config.data.dataset} "
            f"are {means[data.task]}: use the data set it was made with, or start afresh without --resume"
        )
    inside = f" (it is {progress.cursor} steps into epoch {progress.epoch + 1})" if progress.cursor else ""
    found = []
    if contents.data:
        found = differences(Identity.of(contents.data), data)
    elif contents.random.get("samples", data.train.samples) != data.train.samples:
        # Of a file that does not say more.
        found = [f"{contents.random['samples']:,} training samples, there {data.train.samples:,}"]
    seeds = (saved.data.split_seed, config.data.split_seed)
    if len(set(seeds)) > 1 and config.data.dataset not in DATASETS and (found or not contents.data):
        raise UserError(
            f"checkpoint {path} was made with --split-seed {seeds[0]}: with {seeds[1]} it would be tested on samples "
            "that it was trained on; use the same"
        )
    if found and not (config.run.new_data and not progress.cursor):
        fix = f"an epoch is to be ended with the same data{inside}" if config.run.new_data else "use the same data set"
        more = "" if progress.cursor else ", or add --new-data to go on with the other one"
        raise UserError(
            f"--dataset {config.data.dataset} is not the data set that checkpoint {path} was made with: in the "
            f"checkpoint {'; '.join(found)}: {fix}{more}"
        )
    for difference in found:
        tell(f"note: other data than in the checkpoint: {difference}")
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
            # Where it matters it is told as other data.
            continue
        tell(f"note: {name} is {now}, in the checkpoint it was {before}")


def restore(method: Method, path: Path, contents: Contents, config: Config, steps_per_epoch: int) -> list[str]:
    """Fill a method's state from a checkpoint, of whatever method and optimizer; returns notes for the user.

    Weights are taken in any case, the optimizer's vectors where it has the same ones there, the method's own where they
    are there.
    """
    state = method.state
    # What is not in the checkpoint stays as it is.
    method.collect()
    vectors, reason = state.vectors, ""
    saved: str = from_toml(contents.config, str(path), foreign=True).optimization.optimizer
    if saved != config.optimization.optimizer:
        reason = f"the checkpoint is of {saved}, not of {config.optimization.optimizer}"
    else:
        mine, theirs = vectors.keys() - {"weights"} - state.own, contents.vectors - contents.own
        if mine != theirs:
            has, want = (" ".join(sorted(names)) or "no vectors" for names in (theirs, mine))
            reason = f"the checkpoint's optimizer has {has}, these settings have {want}"
    there = {"weights"} if reason else contents.vectors | {"weights"}
    taken = {name: vector for name, vector in vectors.items() if name in there}
    state.update(contents.scalars, state.own if reason else state.scalars.keys())
    fresh = vectors.keys() - taken.keys()
    checkpoint.load(path, method.layout, method.shards[method.rank], taken, contents.part)
    tables = not reason and state.rows.total > 0
    found = tables and checkpoint.load_tables(path, state.tables, state.rows, method.rank)
    if "steps" in state.scalars:
        # A method that goes by the steps of epochs goes on with them, whatever the checkpoint is of.
        state.scalars["steps"] = contents.progress.epoch * steps_per_epoch + contents.progress.cursor
    state.restore()
    method.restored(found, fresh)
    if reason:
        return [f"{reason}: the optimizer starts afresh"]
    notes = [f"the checkpoint has no {' '.join(sorted(fresh))}: these start afresh"] if fresh else []
    return [*notes, f"the checkpoint does not hold {state.lost}"] if tables and not found else notes
