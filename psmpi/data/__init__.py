"""Data sets: opening them, keeping the samples that a process needs, and the order of minibatches."""

from psmpi.data.batch import Batch
from psmpi.data.catalogue import DATASETS, locate, open_dataset, open_split
from psmpi.data.copies import Prints
from psmpi.data.doubts import find_doubts
from psmpi.data.given import ARRAYS, given_dataset, given_samples, task_of
from psmpi.data.identity import (
    Identity,
    SplitIdentity,
    check_same,
    differences,
    identify,
    identify_split,
    other_scale,
    split_differences,
)
from psmpi.data.minibatches import Minibatches
from psmpi.data.private import RANK, alike, card, of_rank, together
from psmpi.data.resident import Resident
from psmpi.data.split import Dataset, Split

__all__ = [
    "ARRAYS",
    "DATASETS",
    "RANK",
    "Batch",
    "Dataset",
    "Identity",
    "Minibatches",
    "Prints",
    "Resident",
    "Split",
    "SplitIdentity",
    "alike",
    "card",
    "check_same",
    "differences",
    "find_doubts",
    "given_dataset",
    "given_samples",
    "identify",
    "identify_split",
    "locate",
    "of_rank",
    "open_dataset",
    "open_split",
    "other_scale",
    "split_differences",
    "task_of",
    "together",
]
