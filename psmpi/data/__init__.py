"""Data sets: opening them, holding the samples a process needs, and the order of minibatches."""

from psmpi.data.batch import Batch
from psmpi.data.catalogue import DATASETS, open_dataset, open_split
from psmpi.data.minibatches import Minibatches
from psmpi.data.resident import Resident
from psmpi.data.split import Dataset, Split

__all__ = ["DATASETS", "Batch", "Dataset", "Minibatches", "Resident", "Split", "open_dataset", "open_split"]
