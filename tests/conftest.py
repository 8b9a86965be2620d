"""Fixtures of all tests."""

import sys

import pytest
from helpers.paths import FAKE
from helpers.runs import launch, once, trainer
from threadpoolctl import threadpool_limits

from psmpi.backend.gpu import runtime


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Matrices of tests are small: several threads would only wait for each other, on cores that other tests need."""
    with threadpool_limits(1):
        yield


@pytest.fixture
def train(tmp_path):
    """train(ranks, *options) runs psmpi.train to its end on ranks that are threads, and returns what it left."""
    return trainer(tmp_path)


@pytest.fixture
def mpi_train(tmp_path):
    """The same in processes, under mpirun where there are several ranks."""
    return trainer(tmp_path, launch)


@pytest.fixture(scope="session")
def serial(tmp_path_factory):
    """serial(*options): the training on one process with these options, made once."""
    return once(tmp_path_factory.mktemp("serial"))


@pytest.fixture
def stand_in(monkeypatch):
    """The stand-in for CuPy as `cupy`, and that for cuDNN as `cudnn`."""
    fakes = ("cupy", "cudnn")
    real = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in fakes}
    for name in real:
        del sys.modules[name]
    monkeypatch.syspath_prepend(FAKE)
    runtime.load_cupy.cache_clear()
    import cupy

    yield cupy
    # What the stand-in never frees: each set of operations has its workspace.
    cupy._memory.clear()
    runtime.stream_of.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] in fakes]:
        del sys.modules[name]
    sys.modules.update(real)
    runtime.load_cupy.cache_clear()
