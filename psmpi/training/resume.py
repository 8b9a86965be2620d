"""Going on from a checkpoint: which of its vectors, tables and scalars a method takes up, and what starts afresh."""

from __future__ import annotations

from pathlib import Path

from psmpi import checkpoint
from psmpi.checkpoint import Contents
from psmpi.config import Config, from_toml
from psmpi.training.method import Method


def restore(method: Method, path: Path, contents: Contents, config: Config) -> list[str]:
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
        # Whatever the checkpoint is of, a method that goes by the steps of the run goes on with them.
        state.scalars["steps"] = contents.progress.step
    state.restore()
    method.restored(found, fresh)
    if reason:
        return [f"{reason}: the optimizer starts afresh"]
    notes = [f"the checkpoint has no {' '.join(sorted(fresh))}: these start afresh"] if fresh else []
    return [*notes, f"the checkpoint does not hold {state.lost}"] if tables and not found else notes
