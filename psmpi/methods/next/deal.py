"""The deal of training samples to agents: at random, sorted by target, or a few classes each."""

from __future__ import annotations

import numpy as np

from psmpi.data import Dataset
from psmpi.errors import UserError

# Key of the deal of samples, which separates it from other draws from a seed.
DEAL = 0x6465616C


def deal_samples(dataset: Dataset, agents: int, how: str, seed: int) -> list[np.ndarray]:
    """Return for each agent the ids of its training samples, increasing; each sample goes to one agent.

    Of a private data set, deal the samples that this rank can read to `agents` agents.

    how: iid, at random; sorted, by class, or by the first value; skewed:K, each agent samples of about K classes
    (McMahan and others, 2017: samples sorted by class are cut into agents times K pieces, and each agent draws K).
    Raise UserError for anything else, or if an agent would have no sample.
    """
    readable = dataset.own or range(dataset.train.n)
    n, targets = len(readable), dataset.train.targets[readable.start : readable.stop]
    return [readable.start + ids for ids in _deal(dataset, targets, n, agents, how, seed)]


def _deal(dataset: Dataset, targets: np.ndarray, n: int, agents: int, how: str, seed: int) -> list[np.ndarray]:
    """Deal `n` samples, numbered from 0, see `deal_samples`."""
    rng = np.random.default_rng([seed, DEAL])
    if how == "iid":
        return [np.sort(part) for part in np.array_split(rng.permutation(n), agents)]
    order = np.argsort(targets.reshape(n, -1)[:, 0], kind="stable")
    if how == "sorted":
        return [np.sort(part) for part in np.array_split(order, agents)]
    kinds = classes_each(how)
    if dataset.task != "classes":
        raise UserError(f"--split {how}: the data set {dataset.name} has no classes: use --split sorted, or iid")
    if n < agents * kinds:
        raise UserError(f"--split {how}: {n} training samples are too few for {agents} agents with {kinds} pieces each")
    pieces = np.array_split(order, agents * kinds)
    drawn = rng.permutation(len(pieces)).reshape(agents, kinds)
    return [np.sort(np.concatenate([pieces[k] for k in numbers])) for numbers in drawn]


def classes_each(how: str) -> int:
    """Return the K of skewed:K; raise UserError for any other `how`."""
    kind, _, number = how.partition(":")
    if kind == "skewed" and number.isdecimal() and 0 < int(number) < 1 << 20:
        return int(number)
    raise UserError(f"--split {how}: expected iid, sorted, or skewed:K with a number of classes K, such as skewed:2")
