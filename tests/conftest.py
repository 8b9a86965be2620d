"""Fixtures of all tests."""

import signal
import sys

import pytest
from helpers.paths import FAKE
from helpers.runs import launch, once, trainer
from hypothesis import settings
from threadpoolctl import threadpool_limits

from psmpi.backend.gpu import runtime

# Programs that a script starts in the background ignore Ctrl-C, and so would the programs of the tests.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Other programs may take the cores.
settings.register_profile("psmpi", deadline=None)
settings.load_profile("psmpi")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Limit linear algebra to one thread: matrices of tests are small, and other tests need the cores."""
    with threadpool_limits(1):
        yield


@pytest.fixture
def train(tmp_path):
    """train(ranks, *options): run psmpi.train on ranks that are threads, and return a `Trained`."""
    return trainer(tmp_path)


@pytest.fixture
def mpi_train(tmp_path):
    """mpi_train(ranks, *options): run psmpi.train in processes, under mpirun if ranks > 1, and return a `Trained`."""
    return trainer(tmp_path, launch)


@pytest.fixture(scope="session")
def serial(tmp_path_factory):
    """serial(*options): train on one rank, once for each `options`, and return a `Trained`."""
    return once(tmp_path_factory.mktemp("serial"))


@pytest.fixture
def stand_in(monkeypatch):
    """Make `import cupy` and `import cudnn` load the stand-ins of tests/fake; yield the stand-in for CuPy."""
    fakes = ("cupy", "cudnn")
    real = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in fakes}
    for name in real:
        del sys.modules[name]
    monkeypatch.syspath_prepend(FAKE)
    runtime.load_cupy.cache_clear()
    import cupy

    yield cupy
    # The stand-in frees no memory itself, and each set of operations has a workspace.
    cupy._memory.clear()
    runtime.stream_of.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] in fakes]:
        del sys.modules[name]
    sys.modules.update(real)
    runtime.load_cupy.cache_clear()
