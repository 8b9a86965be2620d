"""The GPU backend on a stand-in for CuPy, over host memory (see fake/cupy): operations, models, optimizers, exchange.

Tests of single kernels are in test_cuda_kernels.py, of trainings in test_device_mpi.py.
"""

import inspect
import os
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
from helpers import cuda_host
from helpers.layer_examples import NETWORKS, make
from helpers.paths import FAKE
from helpers.problems import random_problem

from psmpi.backend import CompiledOps, CupyOps, NumpyOps, Stripes, compiled, gpu, make_backend
from psmpi.backend.gpu import cudnn, recording, runtime
from psmpi.comm.bridge import GpuAware, Staged
from psmpi.comm.group import Counter, Group
from psmpi.comm.probe import ask_library, probe
from psmpi.data import Resident, open_dataset
from psmpi.errors import UserError
from psmpi.layout import Matrix, Runs
from psmpi.methods.sil.targets import TargetDistance, draw_targets
from psmpi.nn.losses import LOSSES, make_loss
from psmpi.nn.margin import make_margin
from psmpi.nn.metric import Metric
from psmpi.nn.model import Model
from psmpi.nn.objective import GRADIENT_LIMIT, Objective
from psmpi.optim import OPTIMIZERS, Hyper, clip_by_global_norm, is_first_order, make_optimizer
from psmpi.optim.curvature import CurvatureOps, curvature_ops
from psmpi.optim.curvature.compiled import CompiledCurvature
from psmpi.optim.curvature.gpu import CupyCurvature
from psmpi.optim.registry import COUNTED
from psmpi.training.evaluator import Evaluator

F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
TOLERANCE = {F32: 2e-5, F64: 1e-11}
# Methods that the GPU backend inherits: they call other operations.
SHARED = {
    NumpyOps: {"attention", "attention_back", "beside", "fused", "scratch", "add_shared", "sparse_steps",
               "sparse_blocks", "factor_steps", "count_rows", "deal_components"},
    CurvatureOps: {"restriction", "restricted_products"},
}  # fmt: skip

needs_compiler = pytest.mark.skipif(cuda_host.compiler() is None, reason="no g++ to compile the CUDA kernels as C++")


@pytest.fixture(params=["stand-in", pytest.param("gpu", marks=pytest.mark.gpu)])
def cupy(request):
    """The stand-in for CuPy, and CuPy itself on a machine with a GPU."""
    if request.param == "stand-in":
        return request.getfixturevalue("stand_in")
    if not gpu.available():
        pytest.skip("no GPU here, or no CuPy for it")
    return pytest.importorskip("cupy")


class SingleRank:
    rank, size = 0, 1


def put(ops, values):
    mirror = ops.mirror(ops.empty(values.size, values.dtype).reshape(values.shape))
    mirror.host[...] = values
    mirror.push()
    mirror.settle()
    return mirror.array


def relative_error(actual, expected):
    return abs(actual - expected).max(initial=0.0) / max(1e-30, abs(expected).max(initial=0.0))


def public(kind):
    return {
        name: value
        for name, value in inspect.getmembers(kind)
        if not name.startswith("_") and (inspect.isfunction(value) or isinstance(value, property))
    }


@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        *((NumpyOps, CompiledOps), (NumpyOps, CupyOps)),
        *((CurvatureOps, CompiledCurvature), (CurvatureOps, CupyCurvature)),
    ],
)
def test_backends_have_the_same_methods(kind, backend):
    reference = public(kind)
    for name, method in public(backend).items():
        if name in reference and inspect.isfunction(method):
            signatures = (inspect.signature(m).parameters.values() for m in (method, reference[name]))
            actual, expected = ([(p.name, p.kind, p.default) for p in parameters] for parameters in signatures)
            assert actual == expected, name
    if backend in (CupyOps, CupyCurvature):
        inherited = {name for name, method in public(backend).items() if method is reference.get(name)}
        assert inherited == SHARED[kind]


def test_curvature_operations_are_those_of_the_backend(stand_in):
    class Other(NumpyOps):
        name = "other"

    operations = [curvature_ops(ops) for ops in (NumpyOps(), CompiledOps(1), CupyOps(), Other())]
    assert [type(kind) for kind in operations] == [CurvatureOps, CompiledCurvature, CupyCurvature, CurvatureOps]
    assert [kind.ops.name for kind in operations] == ["numpy", "compiled", "cupy", "other"]


def test_the_stand_in_has_the_names_of_cupy():
    pytest.importorskip("cupy", reason="CuPy is not installed")
    program = """
import cupy
import ctypes
from cupy.cuda import compiler, cublas, device, driver, nccl, runtime
assert issubclass(cupy.cuda.memory.OutOfMemoryError, MemoryError)
for owner, names in (
    (cupy, "RawModule asarray asnumpy empty zeros ndarray get_default_pinned_memory_pool"),
    (cupy.lib.stride_tricks, "as_strided"),
    (cupy.cuda, "Device Event Graph Stream alloc_pinned_memory get_elapsed_time"),
    (cupy.cuda.Stream, "begin_capture end_capture is_capturing synchronize use"),
    (cupy.cuda.Event, "record synchronize"),
    (cupy.cuda.Graph, "launch"),
    (runtime, "CUDARuntimeError getDeviceCount driverGetVersion runtimeGetVersion getDeviceProperties memcpyAsync"),
    (runtime, "deviceGetPCIBusId"), (compiler, "CompileException"),
    (driver, "CUDADriverError"), (device, "get_cublas_handle"),
    (ctypes.CDLL(cublas.__file__), "cublasGemmStridedBatchedEx cublasSetStream_v2 cublasSetWorkspace_v2"),
    (nccl, "available get_unique_id groupStart groupEnd NcclCommunicator NCCL_FLOAT32 NCCL_FLOAT64 NCCL_SUM"),
):
    for name in names.split():
        assert hasattr(owner, name), name
assert (runtime.memcpyHostToDevice, runtime.memcpyDeviceToHost) == (1, 2)
assert "bytes commId" in nccl.NcclCommunicator.__doc__ and "bytes object" in nccl.get_unique_id.__doc__
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


CUDNN = """
import inspect
import cudnn


def takes(function, *names):
    try:
        known = inspect.signature(function).parameters
    except ValueError:
        known = function.__doc__
    for name in names:
        assert name in known, (function, name, known)


assert issubclass(cudnn.cudnnGraphNotSupportedError, Exception) and type(cudnn.backend_version()) is int
for owner, names in (
    (cudnn, "create_handle set_stream pygraph"),
    (cudnn.data_type, "FLOAT DOUBLE"), (cudnn.heur_mode, "A FALLBACK"),
    (cudnn.numerical_note, "NONDETERMINISTIC TENSOR_CORE DOWN_CONVERT_INPUTS REDUCED_PRECISION_REDUCTION"),
    (cudnn.pygraph, "validate build_operation_graph check_support build_plans get_workspace_size"),
    (cudnn.pygraph, "conv_fprop conv_wgrad conv_dgrad"),
):
    for name in names.split():
        assert hasattr(owner, name), name
takes(cudnn.set_stream, "handle", "stream")
takes(cudnn.pygraph.__init__, "io_data_type", "intermediate_data_type", "compute_data_type", "handle")
takes(cudnn.pygraph.tensor, "dim", "stride", "data_type", "name")
takes(cudnn.pygraph.execute, "workspace", "handle")
for name in ("create_execution_plans", "deselect_numeric_notes", "deselect_workspace_greater_than"):
    assert hasattr(cudnn.pygraph, name)
if cudnn.__version__ == "fake":
    raise SystemExit
real = cudnn.data_type.FLOAT
try:
    graph = cudnn.pygraph(io_data_type=real, intermediate_data_type=real, compute_data_type=real)
except RuntimeError:
    # Some make none without a device.
    raise SystemExit
sizes = {"image": [9, 4, 8, 8], "weight": [6, 2, 3, 3], "filter": [6, 2, 3, 3], "loss": [9, 6, 3, 3]}
at = {key: graph.tensor(dim=dim, stride=[1, 9, 3, 1], data_type=real, name=key) for key, dim in sizes.items()}
for name, keys in (("fprop", ("image", "weight")), ("wgrad", ("image", "loss")), ("dgrad", ("loss", "filter"))):
    tensors = {key: at[key] for key in keys}
    out = getattr(graph, f"conv_{name}")(**tensors, padding=[0, 0], stride=[2, 2], dilation=[1, 1])
    out.set_output(True).set_dim([1, 1, 1, 1]).set_stride([1, 1, 1, 1]).set_data_type(real)
"""


@pytest.mark.parametrize("kind", ["stand-in", "real"])
def test_the_stand_in_has_the_names_of_cudnn(kind):
    environment = {**os.environ, "PYTHONPATH": str(FAKE)} if kind == "stand-in" else None
    if kind == "real" and find_spec("cudnn") is None:
        pytest.skip("cuDNN is not installed")
    command = [sys.executable, "-c", CUDNN]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert result.returncode == 0, result.stderr


@needs_compiler
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_models_are_those_of_the_reference(cupy, name, dtype):
    network = make(name)
    layout, w, x, d = random_problem(network, batch=5, dtype=dtype)
    device_ops = CupyOps()
    for classes in ([*range(network.classes)], [1], [0, 3]):
        if network.tie() is not None and len(classes) < network.classes:
            continue
        part = layout.part(classes)
        local = np.concatenate([w[a:b] for a, b in part.intervals])
        results = []
        for ops in (NumpyOps(), device_ops):
            g = put(ops, np.full(part.size, np.nan, dtype))
            model = Model(network, layout, put(ops, local), g, ops, classes)
            # A larger minibatch first; the next one must not use its values.
            model.forward(put(ops, np.ones((x.shape[0], 7), dtype)))
            tape = model.forward(put(ops, x))
            scores = ops.host(tape.scores).copy()
            model.backward(tape, put(ops, d[classes]))
            results.append((scores, ops.host(g)))
        for actual, expected in zip(results[1], results[0], strict=True):
            assert relative_error(actual, expected) <= TOLERANCE[dtype]


CONVOLUTIONS = [name for name in NETWORKS if "conv" in str(NETWORKS[name][1])] + ["small psnet"]


@needs_compiler
@pytest.mark.parametrize("chunk", [1, 1 << 20])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_may_be_products_with_windows(cupy, name, chunk, monkeypatch):
    monkeypatch.setattr(CupyOps, "chunk", chunk)
    network = make(name)
    layout, w, x, d = random_problem(network, batch=5, dtype=F32)
    part = layout.part(range(network.classes))
    w = np.concatenate([w[a:b] for a, b in part.intervals])
    results = []
    for ops in (NumpyOps(), CupyOps(compute="tf32")):
        g = put(ops, np.full(part.size, np.nan, F32))
        model = Model(network, layout, put(ops, w), g, ops)
        tape = model.forward(put(ops, x))
        scores = ops.host(tape.scores).copy()
        model.backward(tape, put(ops, d))
        results.append((scores, ops.host(g)))
    # With tf32 the stand-in multiplies float32 numbers, and a GPU rounds them to 10 bits first.
    tolerance = 2e-5 if not gpu.available() or "fake" in str(cupy.__version__) else 1e-2
    for actual, expected in zip(results[1], results[0], strict=True):
        assert relative_error(actual, expected) <= tolerance


def both_ways(name, dtype, device_ops, classes=None):
    """Scores and gradient of a network by the reference, then by `device_ops`, after a minibatch of another size."""
    network = make(name)
    layout, w, x, d = random_problem(network, batch=5, dtype=dtype)
    classes = [*range(network.classes)] if classes is None else classes
    part = layout.part(classes)
    local, results = np.concatenate([w[a:b] for a, b in part.intervals]), []
    for ops in (NumpyOps(), device_ops):
        g = put(ops, np.full(part.size, np.nan, dtype))
        model = Model(network, layout, put(ops, local), g, ops, classes)
        model.forward(put(ops, np.ones((x.shape[0], 7), dtype)))
        tape = model.forward(put(ops, x))
        scores = ops.host(tape.scores).copy()
        model.backward(tape, put(ops, d[classes]))
        results += [scores, ops.host(g)]
    return results


@needs_compiler
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_may_be_those_of_cudnn(cupy, name, dtype):
    fake = cupy.__version__ == "fake"
    if not fake:
        pytest.importorskip("cudnn")
    ops = CupyOps(convolution="cudnn")
    tolerance = TOLERANCE[dtype] if fake else 10 * cudnn.TOLERANCE[str(dtype)]
    for classes in (None, [1], [0, 3]):
        scores, g, device_scores, device_g = both_ways(name, dtype, ops, classes)
        assert relative_error(device_scores, scores) <= tolerance and relative_error(device_g, g) <= tolerance
    # cuDNN was tried for both sizes of minibatches.
    assert {batch for _, batch, _ in ops.cudnn.chosen} == {5, 7}
    # The minibatch of 7 samples had no backward pass.
    assert {work for _, batch, work in ops.cudnn.chosen if batch == 7} == {"output"}
    assert not fake or all(ops.cudnn.chosen.values())


# psmpi's names of cuDNN's operations.
WORK = {"fprop": "output", "wgrad": "gradient of kernels", "dgrad": "gradient of input"}


def test_groups_of_channels_are_known():
    for stripes, expected in (
        ([Stripes(1, 6, 4, 0, 0, 0)], 1),
        ([Stripes(2, 3, 2, 0, 2, 0)], 2),
        # Channels seen twice, overlapping channels, unseen channels, a missing unit, stripes of two sizes.
        ([Stripes(2, 3, 4, 0, 0, 0)], 0),
        ([Stripes(2, 3, 3, 0, 1, 0)], 0),
        ([Stripes(1, 6, 3, 1, 0, 0)], 0),
        ([Stripes(1, 5, 4, 0, 0, 1)], 0),
        ([Stripes(1, 2, 2, 0, 0, 0), Stripes(1, 4, 2, 2, 0, 2)], 0),
    ):
        assert cudnn.groups(stripes, 4, 6) == expected


@needs_compiler
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("build", "cuDNN cannot: no engine proposed a plan"),
        ("execute", "cuDNN cannot: CUDNN_STATUS_EXECUTION_FAILED"),
        ("capture", "cuDNN cannot: CUDNN_STATUS_EXECUTION_FAILED"),
        *((f"{kind} is wrong", "cuDNN is wrong by 0.0") for kind in WORK),
        *((f"{kind} is no number", "cuDNN is wrong by nan") for kind in WORK),
    ],
)
@pytest.mark.parametrize("convolution", ["cudnn", "measured"])
def test_a_cudnn_that_fails_is_not_used(stand_in, monkeypatch, fault, says, convolution):
    import cudnn as library

    stand_in.cuda.clock.costs.update({"cudnn packed": 0.0, "cudnn strided": 0.0, "turn": 0.0})
    monkeypatch.setattr(library, "FAULT", fault)
    ops = CupyOps(convolution=convolution)
    scores, g, device_scores, device_g = both_ways("mean pooling", F32, ops)
    assert relative_error(device_scores, scores) <= TOLERANCE[F32] and relative_error(device_g, g) <= TOLERANCE[F32]
    # Outputs of two layers for two minibatches; for one of them the gradients of two kernels and of one input.
    assert len(ops.choices) == 2 * 2 + 2 + 1
    faulty_work = WORK.get(fault.partition(" ")[0])
    for line, (key, chosen) in zip(ops.choices, ops.cudnn.chosen.items(), strict=True):
        if faulty_work is None or key[-1] == faulty_work:
            assert chosen is None and ": psmpi (" in line
            assert says in line and says.replace("cuDNN", "cuDNN on turned images") in line
        else:
            assert chosen is not None and f", {key[-1]}: cuDNN" in line


@needs_compiler
@pytest.mark.parametrize("kind", WORK)
def test_what_cudnn_has_not_computed_is_not_taken_for_its_result(stand_in, monkeypatch, kind):
    import cudnn as library

    monkeypatch.setattr(library, "FAULT", f"{kind} does nothing")
    ops = CupyOps(convolution="cudnn")
    both_ways("mean pooling", F32, ops)
    for line, (key, chosen) in zip(ops.choices, ops.cudnn.chosen.items(), strict=True):
        assert (chosen is None and line.count("is wrong by") == 2) == (key[-1] == WORK[kind])


@needs_compiler
def test_what_cudnn_does_not_read_as_it_lies_is_turned(stand_in, monkeypatch):
    import cudnn as library

    monkeypatch.setattr(library, "FAULT", "strided")
    stand_in.cuda.clock.costs.update(dict.fromkeys(("conv_forward", "conv_input", "conv_weight"), 50.0))
    stand_in.cuda.clock.costs["cudnn strided"] = 0.0
    for convolution in ("cudnn", "measured"):
        ops = CupyOps(convolution=convolution)
        both_ways("mean pooling", F32, ops)
        assert all(choice.turned for choice in ops.cudnn.chosen.values())
    assert all("cuDNN cannot: no engine" in line for line in ops.choices)


OWN_KERNELS = {"output": "conv_forward", "gradient of kernels": "conv_weight", "gradient of input": "conv_input"}


@needs_compiler
@pytest.mark.parametrize(
    ("costs", "taken"),
    [
        ({"cudnn packed": 20.0, "cudnn strided": 20.0}, "psmpi"),
        ({"cudnn packed": 2.0, "cudnn strided": 9.0}, "cuDNN on turned images"),
        ({"cudnn packed": 2.0, "cudnn strided": 3.0, "turn": 2.0}, "cuDNN"),
    ],
)
@pytest.mark.parametrize("work", OWN_KERNELS)
def test_the_fastest_is_taken_for_each_work(stand_in, costs, taken, work):
    stand_in.cuda.clock.costs.update({**costs, **dict.fromkeys(OWN_KERNELS.values(), 0.0), OWN_KERNELS[work]: 15.0})
    ops = CupyOps(convolution="measured")
    scores, g, device_scores, device_g = both_ways("separable convolution", F32, ops)
    assert relative_error(device_scores, scores) <= TOLERANCE[F32] and relative_error(device_g, g) <= TOLERANCE[F32]
    # All kinds of work were measured.
    assert {key[-1] for key in ops.cudnn.chosen} == OWN_KERNELS.keys()
    for line, key in zip(ops.choices, ops.cudnn.chosen, strict=True):
        assert f": {taken if key[-1] == work else 'psmpi'} (psmpi " in line and line.count(" ms") == 3, line
    shapes = [line.partition(", minibatch")[0] for line in ops.choices]
    assert shapes[0] == "convolution 4x8x8 -> 8x3x3, kernel 4, stride 2, 4 groups, tanh, float32"
    # Each shape is measured once.
    before = len(ops.choices)
    both_ways("separable convolution", F32, ops)
    assert len(ops.choices) == before


@needs_compiler
@pytest.mark.parametrize("compute", ["float32", "tf32"])
@pytest.mark.parametrize(
    "stripes",
    [
        pytest.param([Stripes(2, 3, 2, 0, 2, 0)], id="each channel once"),
        pytest.param([Stripes(3, 2, 2, 0, 1, 0)], id="channels of several stripes"),
        pytest.param([Stripes(2, 3, 1, 0, 2, 0)], id="channels of none"),
        pytest.param([Stripes(1, 2, 2, 0, 0, 0), Stripes(1, 4, 2, 1, 0, 2)], id="two sets"),
    ],
)
def test_gradients_of_channels_are_sums_over_the_stripes_that_see_them(cupy, stripes, compute):
    ops, host = CupyOps(compute=compute), NumpyOps()
    arguments = (stripes, (4, 5, 5), (6, 3, 3), 3, 1, F32)
    rng = np.random.default_rng(0)
    shapes = ((4, 5, 5, 3), (6, 3, 3, 3), (6, stripes[0].n_in, 3, 3), (6,))
    x, dy, kernels, bias = (rng.normal(size=shape).astype(F32) for shape in shapes)
    # The host computes each stripe by itself, so that no channels overlap.
    expected = np.zeros_like(x)
    for s in stripes:
        for k in range(s.count):
            source, out = s.source + k * s.source_step, s.out + k * s.n
            stripe_plan = host.convolution([Stripes(1, s.n, s.n_in, 0, 0, 0)], (s.n_in, 5, 5), (s.n, 3, 3), 3, 1, F32)
            stripe_plan.reserve(3)
            seen, units = slice(source, source + s.n_in), slice(out, out + s.n)
            stripe_dx = np.empty((s.n_in, 5, 5, 3), F32)
            stripe_plan.backward(np.ascontiguousarray(x[seen]), dy[units], kernels[units], None, stripe_dx)
            expected[seen] += stripe_dx
    plan = ops.convolution(*arguments)
    plan.reserve(3)
    x, dy, kernels, bias = (put(ops, array) for array in (x, dy, kernels, bias))
    dx, y = put(ops, np.full(shapes[0], np.nan, F32)), put(ops, np.zeros(shapes[1], F32))
    plan.prepare(kernels)
    plan.forward(x, kernels, bias, y)
    plan.backward(x, dy, kernels, None, dx)
    assert relative_error(ops.host(dx), expected) <= (TOLERANCE[F32] if compute == "float32" else 5e-3)


@needs_compiler
def test_psmpi_s_gradient_has_the_kernels_of_cudnn_s_output_when_that_is_played_back(stand_in):
    stand_in.cuda.clock.costs.update({"cudnn packed": 5.0, "cudnn strided": 5.0, "conv_forward": 50.0})
    stand_in.cuda.clock.costs["conv_input"] = 0.0
    ops = CupyOps(convolution="measured")
    plan = ops.convolution([Stripes(1, 2, 1, 0, 0, 0)], (1, 4, 4), (2, 2, 2), 3, 1, F32)
    plan.reserve(3)
    rng = np.random.default_rng(0)
    shapes = ((2, 1, 3, 3), (2,), (1, 4, 4, 3), (2, 2, 2, 3), (2, 2, 2, 3), (1, 4, 4, 3))
    mirrors = [ops.mirror(ops.zeros(int(np.prod(n)), F32).reshape(n)) for n in shapes]
    kernels, bias, x, y, dy, dx = (mirror.array for mirror in mirrors)

    def forward():
        plan.prepare(kernels)
        plan.forward(x, kernels, bias, y)

    recorded = ops.record(forward)
    for step in range(4):
        for mirror in mirrors[:5]:
            mirror.settle()
            mirror.host[...] = rng.normal(size=mirror.host.shape)
            mirror.push()
        recorded()
        # The backward pass is not recorded.
        plan.backward(x, dy, kernels, None, dx)
        expected = np.zeros((1, 4, 4, 3), F32)
        reference = NumpyOps().convolution([Stripes(1, 2, 1, 0, 0, 0)], (1, 4, 4), (2, 2, 2), 3, 1, F32)
        reference.reserve(3)
        reference.backward(mirrors[2].host, mirrors[4].host, mirrors[0].host, None, expected)
        assert relative_error(ops.host(dx), expected) <= TOLERANCE[F32], step
    kinds = {work: chosen for (_, _, work), chosen in ops.cudnn.chosen.items()}
    assert kinds["output"] is not None and kinds["gradient of input"] is None


@needs_compiler
def test_without_graphs_cudnn_is_tried_as_it_is(stand_in, monkeypatch):
    monkeypatch.setattr(stand_in.cuda, "FAULT", "graphs")
    ops = CupyOps(convolution="cudnn")
    both_ways("mean pooling", F32, ops)
    assert ops.choices and all(ops.cudnn.chosen.values())


@needs_compiler
@pytest.mark.parametrize("compute", ["float32", "tf32"])
def test_cudnn_uses_the_bits_that_were_asked_for_and_the_same_each_time(stand_in, compute):
    import cudnn as library

    ops = CupyOps(compute=compute, convolution="cudnn")
    both_ways("mean pooling", F32, ops)
    both_ways("mean pooling", F64, ops)
    always = {"NONDETERMINISTIC", "REDUCED_PRECISION_REDUCTION"}
    notes = {"FLOAT": always, "DOUBLE": always | {"DOWN_CONVERT_INPUTS"}}
    if compute == "float32":
        notes["FLOAT"] = notes["DOUBLE"] | {"TENSOR_CORE"}
    assert all(ops.cudnn.chosen.values()) and {real for real, _ in library.built} == {F32, F64}
    for real, barred in library.built:
        assert set(barred) == notes["FLOAT" if real == F32 else "DOUBLE"]


@needs_compiler
def test_cudnn_is_not_asked_for_fewer_bits_than_tf32(stand_in):
    with pytest.raises(UserError, match="computes with float32 and tf32"):
        CupyOps(compute="bfloat16", convolution="cudnn")


@needs_compiler
def test_nothing_is_tried_while_a_step_is_recorded(stand_in):
    ops = CupyOps(convolution="cudnn")
    network = make("mean pooling")
    layout, w, x, _ = random_problem(network, batch=5, dtype=F32)
    model = Model(network, layout, put(ops, w), None, ops)
    model.reserve(9)
    images, before = put(ops, x), ops.allocations
    ops.stream.begin_capture()
    tape = model.forward(images)
    graph = ops.stream.end_capture()
    assert not ops.cudnn.chosen and ops.allocations == before
    graph.launch(ops.stream)
    recorded = ops.host(tape.scores).copy()
    assert relative_error(ops.host(model.forward(images).scores), recorded) <= TOLERANCE[F32]
    assert all(ops.cudnn.chosen.values()) and ops.allocations > before


@needs_compiler
def test_arrays_that_begin_anywhere_are_not_for_cudnn(stand_in):
    ops = CupyOps(convolution="cudnn")
    plan = ops.convolution([Stripes(1, 2, 1, 0, 0, 0)], (1, 4, 4), (2, 2, 2), 3, 1, F32)
    plan.reserve(3)
    rng = np.random.default_rng(0)
    kernels, bias, x = (put(ops, rng.normal(size=n).astype(F32)) for n in (18, 2, 49))
    kernels, y = kernels.reshape(2, 1, 3, 3), put(ops, np.zeros((2, 2, 2, 3), F32))
    plan.prepare(kernels)
    plan.forward(x[1:].reshape(1, 4, 4, 3), kernels, bias, y)
    assert not ops.cudnn.chosen and np.isfinite(ops.host(y)).all()
    plan.forward(x[:48].reshape(1, 4, 4, 3), kernels, bias, y)
    assert all(ops.cudnn.chosen.values())


@needs_compiler
@pytest.mark.parametrize("fault", ["import", "handle"])
def test_without_cudnn_the_error_says_what_to_install(stand_in, monkeypatch, fault):
    monkeypatch.setenv("FAKE_CUDNN", fault)
    with pytest.raises(UserError, match=r"cuDNN does not load .*pip install 'psmpi\[cudnn\]' \(CUDA 13\)"):
        make_backend("cupy", convolution="cudnn")
    ops = make_backend("cupy", convolution="measured")
    assert ops.cudnn is None and "cuDNN" not in ops.description
    (line,) = ops.choices
    assert line.startswith("--convolution measured: psmpi's own alone: cuDNN does not load")


@needs_compiler
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_and_its_gradient_are_those_of_the_reference(cupy, name, dtype):
    network = make("small psnet")
    layout, w, x, _ = random_problem(network, batch=9, dtype=dtype)
    labels = np.arange(9) % 10
    for weights, pairs in ((w, None), (40 * w, None), (w, np.triu(np.ones((10, 10), bool), 5))):
        if pairs is not None:
            if not LOSSES[name].pairwise:
                continue
            pairs = pairs | pairs.T
        results = []
        for ops in (NumpyOps(), CupyOps()):
            g = put(ops, np.zeros(layout.size, dtype))
            model = Model(network, layout, put(ops, weights), g, ops)
            objective = Objective(make_loss(name, dtype, kappa=3.0), model)
            objective.reserve(10, 9)
            mask = None if pairs is None else put(ops, pairs)
            tape = model.forward(put(ops, x))
            objective.derive(tape, tape.scores, put(ops, labels), 1 / 9, mask)
            results.append((objective.value(), ops.host(g), objective.loss.clipped))
        (value, g, clipped), (device_value, device_g, device_clipped) = results
        assert device_value == pytest.approx(value, rel=100 * TOLERANCE[dtype]) and device_clipped == clipped
        if abs(g).max() < GRADIENT_LIMIT[dtype]:
            assert relative_error(device_g, g) <= 100 * TOLERANCE[dtype]
        else:
            # A gradient beyond the limit is cut to it.
            assert name == "psl" and abs(device_g).max() == GRADIENT_LIMIT[dtype]


@needs_compiler
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize(("kind", "size"), [("arcface", 0.5), ("arcface", 1.4), ("cosface", 0.3)])
@pytest.mark.parametrize("name", LOSSES)
def test_margins_are_those_of_the_reference(cupy, name, kind, size, dtype):
    network, results = make("cosines"), []
    layout, w, x, _ = random_problem(network, batch=40, dtype=dtype)
    labels = np.arange(40) % 4
    for ops in (NumpyOps(), CupyOps()):
        model = Model(network, layout, put(ops, w), put(ops, np.zeros(layout.size, dtype)), ops)
        objective = Objective(make_loss(name, dtype), model)
        objective.loss.margin = make_margin(kind, size, 3.0, dtype)
        objective.reserve(4, 40)
        tape = model.forward(put(ops, x))
        objective.derive(tape, tape.scores, put(ops, labels), 1e6)
        results.append((objective.value(), ops.host(model.g), float(ops.host(objective.report.array)[3])))
    (value, g, peak), (device_value, device_g, device_peak) = results
    tolerance = 100 * TOLERANCE[dtype]
    assert device_value == pytest.approx(value, rel=tolerance) and device_peak == pytest.approx(peak, rel=tolerance)
    assert relative_error(device_g, g) <= tolerance


@needs_compiler
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_the_distance_from_targets_and_its_gradient_are_those_of_the_reference(cupy, dtype):
    network = make("small psnet")
    layout, w, x, _ = random_problem(network, batch=9, dtype=dtype)
    targets, labels, results = draw_targets("gaussian", 10, 10, 0, 1, 3.0), np.arange(9) % 10, []
    for ops in (NumpyOps(), CupyOps()):
        g = put(ops, np.zeros(layout.size, dtype))
        model = Model(network, layout, put(ops, w), g, ops)
        loss = TargetDistance(targets, 3.0, ops)
        objective = Objective(loss, model)
        objective.reserve(10, 9)
        tape = model.forward(put(ops, x))
        objective.derive(tape, tape.scores, put(ops, labels), 1 / 9)
        results.append((objective.value(), ops.host(g), ops.host(objective.report.array)))
        assert loss.nbytes >= 8 * targets.size and (objective.fused is not None) == ops.on_device
    (value, g, report), (device_value, device_g, device_report) = results
    assert (
        device_value == pytest.approx(value, rel=TOLERANCE[dtype]) and relative_error(device_g, g) <= TOLERANCE[dtype]
    )
    assert device_report == pytest.approx(report, rel=TOLERANCE[dtype]) and device_report[3] > 0
    model.w[:] = put(ops, np.full_like(w, np.nan))
    tape = model.forward(put(ops, x))
    objective.derive(tape, tape.scores, put(ops, labels), 1 / 9)
    with pytest.raises(FloatingPointError, match="the loss is not a finite number"):
        objective.value()


class Slow(LOSSES["logistic"]):
    """A loss without a kernel."""

    name = "slow"


@needs_compiler
def test_a_loss_without_a_kernel_of_its_own_goes_through_host_memory_outside_of_recordings(stand_in):
    network = make("small psnet")
    layout, w, x, _ = random_problem(network, batch=9)
    results, labels = [], np.arange(9) % 10
    for kind in (LOSSES["logistic"], Slow):
        ops = CupyOps()
        model = Model(network, layout, put(ops, w), put(ops, np.zeros_like(w)), ops)
        objective = Objective(kind(F32), model)
        objective.reserve(10, 9)
        inputs = put(ops, x), put(ops, labels)

        def work(b, objective=objective, model=model, inputs=inputs):
            tape = model.forward(inputs[0])
            objective.derive(tape, tape.scores, inputs[1], 1 / b)

        recorded, before = objective.record(work), ops.stream.launches
        # The second call records.
        for _ in range(3):
            model.g.fill(0)
            recorded(9)
        results.append((objective.value(), ops.host(model.g), ops.host(objective.report.array)[[0, 3]]))
        assert (ops.stream.launches > before) == (kind is not Slow) and ops.graphs
    (value, g, report), (device_value, device_g, device_report) = results
    assert device_value == pytest.approx(value, rel=1e-12) and relative_error(device_g, g) <= TOLERANCE[F32]
    assert device_report == pytest.approx(report, rel=1e-12) and device_report[1] > 0
    model.w[:] = put(ops, np.full_like(w, np.nan))
    with np.errstate(invalid="ignore"), pytest.raises(FloatingPointError, match="the loss is not a finite number"):
        recorded(9)


@needs_compiler
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_values_to_learn_are_those_of_the_reference(cupy, dtype):
    network = make("small psnet")
    layout, w, x, _ = random_problem(network, batch=9, dtype=dtype)
    targets, results = np.random.default_rng(0).normal(size=(9, 10)), []
    for ops in (NumpyOps(), CupyOps()):
        model = Model(network, layout, put(ops, w), put(ops, np.zeros(layout.size, dtype)), ops)
        objective = Objective(make_loss("squared", dtype, task="regression"), model)
        objective.reserve(10, 9)
        objective.bring(targets.T)
        tape = model.forward(put(ops, x))
        objective.derive(tape, tape.scores, objective.targets(9), 1 / 9)
        results.append((objective.value(), ops.host(model.g)))
    (value, g), (device_value, device_g) = results
    assert (
        device_value == pytest.approx(value, rel=TOLERANCE[dtype]) and relative_error(device_g, g) <= TOLERANCE[dtype]
    )


@needs_compiler
def test_what_is_no_number_is_said(cupy):
    network = make("small psnet")
    layout, w, x, _ = random_problem(network, batch=2)
    for name, says in (("psl", "a score is not a finite number"), ("nll", "the loss is not a finite number")):
        ops = CupyOps()
        model = Model(network, layout, put(ops, np.full_like(w, np.nan)), put(ops, w), ops)
        objective = Objective(make_loss(name, w.dtype), model)
        objective.reserve(10, 2)
        tape = model.forward(put(ops, x))
        objective.derive(tape, tape.scores, put(ops, np.zeros(2, int)), 1.0)
        with pytest.raises(FloatingPointError, match=says):
            objective.value()
    objective = Objective(make_loss("psl", w.dtype, exp_clip="off"), model)
    objective.reserve(10, 2)
    model.w[:] = put(ops, 1e4 * w)
    tape = model.forward(put(ops, x))
    objective.derive(tape, tape.scores, put(ops, np.zeros(2, int)), 1.0)
    with pytest.raises(FloatingPointError, match="--exp-clip is off"):
        objective.value()


@needs_compiler
def test_recorded_work_is_played_back(stand_in):
    ops = CupyOps()
    a, b = put(ops, np.zeros(4)), put(ops, np.ones(4))
    calls = []

    def work(n):
        calls.append(n)
        for _ in range(n):
            ops.add_bias(a.reshape(1, 1, 4), b[:1].reshape(1, 1))
        return a[:n]

    recorded, before = ops.record(work), ops.stream.launches
    for k in range(1, 6):
        assert recorded(2).shape == (2,)
        assert np.array_equal(ops.host(a), np.full(4, 2.0 * k))
    # The first call does the work, the second one records it, and the others launch the graph.
    assert calls == [2, 2] and ops.stream.launches - before == 4
    recorded(3)
    assert calls == [2, 2, 3] and np.array_equal(ops.host(a), np.full(4, 13.0))
    # A separate set of operations has its own memory, also for sums.
    separate, allocations = ops.separate(), ops.allocations
    assert separate.squared_norm(put(separate, np.full(9, 2.0))) == 36
    assert ops.allocations == allocations and separate.buffers and not ops.buffers
    recorded(2)
    assert calls == [2, 2, 3] and np.array_equal(ops.host(a), np.full(4, 15.0))
    # Memory may have moved after an allocation, which discards recordings.
    ops.empty(1, F32)
    recorded(2)
    assert calls == [2, 2, 3, 2] and np.array_equal(ops.host(a), np.full(4, 17.0))
    for k in range(recording.KEPT + 9):
        recorded(k)
    assert len(recorded.made) == recording.KEPT
    ops_without_graphs, before = CupyOps(graphs=False), ops.stream.launches
    recorded, calls[:] = ops_without_graphs.record(lambda: calls.append(0)), []
    for _ in range(4):
        recorded()
    assert calls == [0] * 4 and ops_without_graphs.stream.launches == before


@needs_compiler
def test_recorded_work_is_that_of_its_arrays_memory_and_shape(stand_in):
    ops, works = CupyOps(), []
    unit, a, b = put(ops, np.ones(1)), put(ops, np.zeros(4)), put(ops, np.zeros(4))

    def add(first, second, times):
        works.append((first.shape, times))
        for array in (first, second):
            if array is not None:
                ops.spread(
                    "combine", array.dtype, array.size, array.size, array, array, unit, 0, 0, 1.0, times, 0.0, 0.0
                )

    recorded = ops.record(add)
    for k in range(1, 5):
        # Each call gets new views.
        recorded(a[:1], None, 1.0)
        recorded(a[1:2], None, 1.0)
        recorded(a[:1].reshape(1, 1), b[:1], 100.0)
        recorded(a[:1], None, 1000.0)
        assert ops.host(a).tolist() == [1101.0 * k, k, 0, 0] and ops.host(b).tolist() == [100.0 * k, 0, 0, 0]
        assert len(works) == min(2, k) * 4
    # The same memory with other strides is another array.
    square = a.reshape(2, 2)
    for turned in (False, True) * 3:
        recorded(ops.view(a, 0, (2, 2), (1, 2)) if turned else square, None, 0.0)
    assert len(works) == 8 + 4


@needs_compiler
def test_without_graphs_work_is_done_as_it_is(stand_in, monkeypatch):
    monkeypatch.setattr(stand_in.cuda, "FAULT", "graphs")
    ops = CupyOps()
    a = put(ops, np.zeros(4))
    recorded = ops.record(lambda: ops.add_bias(a.reshape(1, 1, 4), put(ops, np.ones(1)).reshape(1, 1)))
    recorded.allocations = ops.allocations
    recorded.made[()] = None
    with pytest.warns(UserWarning, match="CUDA graphs are not used"):
        recorded()
    recorded()
    assert not ops.graphs and np.array_equal(ops.host(a), np.full(4, 2.0))


KERNELS = {name: hasattr(CupyOps, OPTIMIZERS[name].operation) for name in sorted(OPTIMIZERS) if is_first_order(name)}


@pytest.mark.parametrize("name", KERNELS)
def test_the_device_has_a_fused_pass_of_first_order_rules_or_says_what_has_one(stand_in, name):
    for counted in (False,) if OPTIMIZERS[name].needs_matrices else (False, True):
        assert make_optimizer(name, 3, F32, Hyper(), NumpyOps(), counted, ()).fused is None
        if KERNELS[name]:
            step = make_optimizer(name, 3, F32, Hyper(), CupyOps(), counted, ()).fused
            assert callable(step) and step.__name__.startswith("counted_") == (counted and name in COUNTED)
        else:
            with pytest.raises(UserError, match="no kernel of"):
                make_optimizer(name, 3, F32, Hyper(), CupyOps(), counted)


@needs_compiler
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize(
    ("name", "counted"),
    [*((name, False) for name in OPTIMIZERS if KERNELS.get(name, True)), ("adam", True), ("adamw", True)],
)
def test_optimizers_step_as_on_the_host(cupy, name, counted, dtype):
    rng = np.random.default_rng(1)
    n, hyper = 2101, Hyper(weight_decay=0.01, history=3)
    start, target = rng.normal(size=(2, n)).astype(dtype)
    results = []
    for ops in (NumpyOps(), CupyOps()):
        w, g = put(ops, start), put(ops, np.zeros(n, dtype))
        optimizer = make_optimizer(name, n, dtype, hyper, ops, counted, (Matrix(5, 40, 20), Matrix(900, 12, 30)))
        # All vectors of the optimizer are in the same kind of memory as the weights.
        sized = [a for a in (*vars(optimizer).values(), *optimizer.vectors.values()) if getattr(a, "shape", ()) == (n,)]
        assert len(sized) >= len(optimizer.vectors) and all(type(a) is type(w) for a in sized)

        def objective(ops=ops, w=w, g=g):
            host_w = ops.host(w)
            g[:] = put(ops, (host_w - target) ** 3)
            return 0.25 * float(((host_w - target).astype(float) ** 4).sum())

        for _ in range(4):
            value = objective()
            assert np.isfinite(value)
            if not optimizer.needs_closure:
                clip_by_global_norm(g, 1.0, lambda a: a, ops)
            optimizer.step(w, g, 0.1, lambda a: a, objective)
        results.append({"w": ops.host(w), **{k: ops.host(v) for k, v in optimizer.vectors.items()}})
        scalars = results[0].setdefault("scalars", optimizer.scalars)
        assert optimizer.scalars == pytest.approx(scalars, rel=1e-3)
    assert relative_error(results[1]["w"], results[0]["w"]) <= 10 * TOLERANCE[dtype]
    del results[0]["scalars"]
    for key, vector in results[0].items():
        assert relative_error(results[1][key], vector) <= 1000 * TOLERANCE[dtype], key


@needs_compiler
def test_counted_steps_may_have_moments_without_decay(cupy):
    results = []
    for ops in (NumpyOps(), CupyOps()):
        w, g = put(ops, np.ones(3)), put(ops, np.arange(3.0))
        optimizer = make_optimizer("adam", 3, F64, Hyper(beta1=0.0, beta2=0.0), ops, counted=True)
        for _ in range(2):
            optimizer.step(w, g, 0.1, lambda a: a)
        results.append(ops.host(w))
    assert relative_error(results[1], results[0]) <= 1e-15 and results[0] == pytest.approx([1, 0.8, 0.8])


@needs_compiler
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("n", [0, 1, 2001])
def test_sums_of_multiples_have_the_same_bits_on_all_backends(cupy, n, dtype):
    rng = np.random.default_rng(n)
    factors, arrays = (1, -0.3, -1, 1 / 3, 7.5, 1e-3, 1, -2), rng.normal(size=(8, n + 8)).astype(dtype)
    for count in range(1, 9):
        for inside in (False, True):
            results = []
            for ops in (NumpyOps(), CompiledOps(), CupyOps()):
                backend_arrays = [put(ops, a) for a in arrays]
                # Arrays start at different alignments.
                pieces = [a[k:][:n] for k, a in enumerate(backend_arrays)]
                out = pieces[0] if inside else put(ops, np.full(n + 1, np.nan, dtype))[1:]
                ops.combine(out, *zip(factors[:count], pieces, strict=False))
                ops.multiply(out, pieces[7])
                results.append(ops.host(out).tobytes())
            assert results[0] == results[1] == results[2]


@needs_compiler
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("n", [0, 1, 2001])
def test_scalar_products_are_those_of_the_reference(cupy, n, dtype):
    ops, vectors = CupyOps(), np.random.default_rng(n).normal(size=(20, n + 20)).astype(dtype)
    host_vectors = [a[k:][:n] for k, a in enumerate(vectors)]
    device_vectors = [put(ops, a)[k:][:n] for k, a in enumerate(vectors)]
    for count in (0, 1, 4, 9, 200):
        which = [(k // 15, (7 * k + 1) % 20) for k in range(count)]
        expected = NumpyOps().dots([(host_vectors[i], host_vectors[j]) for i, j in which])
        pairs = [(device_vectors[i], device_vectors[j]) for i, j in which]
        first = ops.dots(pairs)
        assert first.dtype == F64 and first == pytest.approx(expected, rel=1e-12, abs=1e-12)
        before, kept = ops.allocations, first.copy()
        assert np.array_equal(ops.dots(pairs), kept) and ops.allocations == before
        # Later calls do not change a returned array.
        ops.dots([(device_vectors[19], device_vectors[19])])
        assert np.array_equal(first, kept)
    for a, b in zip(host_vectors, device_vectors, strict=True):
        assert ops.abs_sum(b) == pytest.approx(NumpyOps().abs_sum(a), rel=1e-6 if dtype == F32 else 1e-12)
        assert ops.squared_norm(b) == pytest.approx(NumpyOps().squared_norm(a), rel=1e-12)


@needs_compiler
@pytest.mark.parametrize("stored", [np.uint8, np.float32, np.float64, np.int16, np.float16])
def test_samples_are_scaled_on_the_device(cupy, stored):
    values = np.random.default_rng(0).integers(0, 100, (40, 37)).astype(stored)
    for dtype in (F32, F64):
        ops = CupyOps()
        kept = ops.samples(values, 1 / 255)
        assert kept.nbytes >= values.nbytes
        for b in (3, 33, 1):
            at = np.random.default_rng(b).integers(0, 40, b)
            expected, out = np.empty((37, b), dtype), ops.empty(37 * b, dtype).reshape(37, b)
            NumpyOps().samples(values, 1 / 255).fetch(at, expected)
            kept.fetch(at, out)
            assert np.array_equal(ops.host(out), expected)


@needs_compiler
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_minibatches_of_compressed_rows_are_made_on_the_device(cupy, dtype):
    rng, ops = np.random.default_rng(0), CupyOps()
    lengths = rng.integers(0, 300, 20)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    columns = np.concatenate([np.sort(rng.choice(400, k, replace=False)) for k in lengths]).astype(np.int32)
    values = rng.standard_normal(len(columns)).astype(dtype)
    kept = ops.compressed_samples(starts, columns, values, 400)
    assert kept.nbytes == starts.nbytes + columns.nbytes + values.nbytes
    for at in (np.array([3, 19, 3]), np.arange(20), np.array([7]), np.array([], np.int64)):
        expected, out = np.empty((400, len(at)), dtype), ops.empty(400 * len(at), dtype).reshape(400, len(at))
        out.fill(np.nan)
        NumpyOps().compressed_samples(starts, columns, values, 400).fetch(at, expected)
        kept.fetch(at, out)
        assert np.array_equal(ops.host(out), expected)


@needs_compiler
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_samples_on_the_device_are_those_that_are_there_when_they_are_taken(cupy, dtype):
    values = np.random.default_rng(0).normal(size=(6, 5)).astype(dtype)
    for ops in (NumpyOps(), CupyOps()):
        stored = ops.empty(30, dtype).reshape(6, 5)
        samples = ops.samples(stored, 1.0)
        assert samples.nbytes == stored.nbytes
        stored[1:5:3] = ops.put(values.T[:, 1:5:3].copy()).T
        out = ops.empty(15, dtype).reshape(5, 3)
        samples.fetch(np.array([4, 1, 4]), out)
        assert np.array_equal(ops.host(out), values[[4, 1, 4]].T)


@needs_compiler
def test_a_test_of_shards_moves_nothing_that_is_recorded(cupy):
    split, network, scores = open_dataset("digits", "").test, make("small psnet"), []
    layout, w, _, _ = random_problem(network, batch=1, dtype=F64)
    for ops in (NumpyOps(), CupyOps()):
        group, shard = Group(SingleRank(), [0], Counter()), Runs(((0, layout.size),))
        weights, metric = ops.mirror(put(ops, w)), Metric(make_loss("nll", F64), 10)
        weights.host[:] = w
        evaluator = Evaluator(network, group, [shard], weights, split, metric, ops)
        allocations = getattr(ops, "allocations", 0)
        scores.append(evaluator.run())
        assert getattr(ops, "allocations", 0) == allocations
    assert scores[1] == pytest.approx(scores[0], rel=1e-9)


@needs_compiler
def test_a_resident_split_may_be_on_the_device(cupy):
    split = open_dataset("digits", "").train
    ops = CupyOps()
    host_split, device_split = (Resident(split, np.arange(50), F32, split_ops) for split_ops in (None, ops))
    expected, out = np.empty((64, 7), F32), ops.empty(64 * 7, F32).reshape(64, 7)
    host_split.fetch(np.arange(7) * 7, expected)
    device_split.fetch(np.arange(7) * 7, out)
    assert np.array_equal(ops.host(out), expected)


@needs_compiler
@pytest.mark.parametrize("compute", ["float32", "tf32", "float16", "bfloat16"])
def test_products_take_all_orders_of_matrices(cupy, compute):
    rng = np.random.default_rng(0)
    ops = CupyOps(compute=compute)
    for count, m, k, n in ((1, 1, 1, 1), (3, 4, 5, 6), (2, 1, 7, 1), (1, 5, 1, 3), (4, 1, 1, 6), (2, 6, 3, 1)):
        for a_turned in (False, True):
            for b_turned in (False, True):
                a = rng.normal(size=(count, k, m) if a_turned else (count, m, k)).astype(F32)
                b = rng.normal(size=(count, n, k) if b_turned else (count, k, n)).astype(F32)
                out = put(ops, np.full((count, m, n), np.nan, F32))
                operands = (put(ops, v).transpose(0, 2, 1) if turned else put(ops, v)
                          for v, turned in ((a, a_turned), (b, b_turned)))  # fmt: skip
                ops.matmul(*operands, out)
                a, b = (v.transpose(0, 2, 1) if t else v for v, t in ((a, a_turned), (b, b_turned)))
                assert relative_error(ops.host(out), a @ b) <= 1e-5
    blocks = put(ops, np.zeros((2, 4, 4), F32))
    with pytest.raises(ValueError, match="contiguous rows"):
        ops.matmul(blocks, blocks, ops.view(blocks, 0, (2, 2, 4), (16, 1, 2)))


@needs_compiler
def test_a_staged_array_waits_for_its_copies(cupy):
    ops = CupyOps()
    bridge = Staged(ops)
    vector = put(ops, np.arange(10.0))
    # Copies that begin early have the values of the vector.
    bridge.begin(vector[2:5])
    bridge.begin(vector[5:9])
    assert np.array_equal(bridge.outgoing(vector[2:5]), [2, 3, 4])
    assert np.array_equal(bridge.outgoing(vector[5:9]), [5, 6, 7, 8])
    for k in range(3):
        buffer = bridge.incoming(vector)
        buffer[:] = 100.0 + k
        bridge.arrived(vector, [slice(1, 3), slice(8, 9)])
    expected = np.arange(10.0)
    expected[[1, 2, 8]] = 102.0
    assert np.array_equal(ops.host(vector), expected)
    host_array = np.ones(3)
    assert bridge.outgoing(host_array) is host_array and bridge.incoming(host_array) is host_array
    assert len(bridge.mirrors) == 3


@needs_compiler
def test_the_probe_compares_values(cupy):
    ops = CupyOps()
    assert probe(SingleRank(), ops, GpuAware(ops), size=1000)

    class Wrong(GpuAware):
        def outgoing(self, array, pieces=()):
            array[:1] = put(ops, np.full(1, 7, array.dtype))
            return super().outgoing(array, pieces)

    class Forgetful(Staged):
        def arrived(self, array, pieces=()):
            pass

    from mpi4py import MPI

    if MPI.COMM_WORLD.size == 1:
        # One rank sends nothing, so no value is wrong. The test with several ranks is in test_device_mpi.py.
        assert probe(SingleRank(), ops, Wrong(ops), size=1000) and probe(SingleRank(), ops, Forgetful(ops), size=1000)


def test_an_mpi_that_says_no_is_believed():
    pytest.importorskip("mpi4py.MPI")
    with pytest.raises(UserError, match="not GPU-aware"):
        ask_library()


def error_of(monkeypatch, fake, fault):
    monkeypatch.setattr(fake.cuda, "FAULT", fault)
    with pytest.raises(UserError) as caught:
        make_backend("cupy")
    assert make_backend("auto", local_rank=0).name != "cupy"
    return str(caught.value)


def test_without_a_device_the_error_says_what_to_do(stand_in, monkeypatch):
    error = error_of(monkeypatch, stand_in, "driver")
    assert "no NVIDIA driver" in error and "--backend compiled" in error
    error = error_of(monkeypatch, stand_in, "old driver")
    assert "supports CUDA 12.4" in error and "built for CUDA 13:" in error and "cupy-cuda12x" in error
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    error = error_of(monkeypatch, stand_in, "device")
    assert "cudaErrorNoDevice" in error and "CUDA_VISIBLE_DEVICES is ''" in error


@needs_compiler
def test_a_gpu_without_a_compiler_is_not_used(stand_in, monkeypatch):
    monkeypatch.setattr(stand_in.cuda, "FAULT", "compiler")
    with pytest.raises(UserError, match=r"NVRTC and the CUDA headers: pip install"):
        make_backend("cupy").compile(F32)


def test_without_cupy_the_error_says_what_to_install(monkeypatch):
    def missing():
        raise ImportError("No module named 'cupy'")

    monkeypatch.setattr(runtime, "load_cupy", missing)
    with pytest.raises(UserError, match=r"pip install 'psmpi\[cuda\]'"):
        make_backend("cupy")


@needs_compiler
def test_ranks_take_devices_in_turn(stand_in, monkeypatch):
    monkeypatch.setattr(stand_in.cuda, "DEVICES", 2)
    assert [make_backend("auto", local_rank=rank).device for rank in range(4)] == [0, 1, 0, 1]
    assert make_backend("cupy").device == 0
    # Without a number on the host, a device has to be asked for.
    assert make_backend("auto").name == ("compiled" if compiled.level() else "numpy")


def test_kernels_are_cached_where_nobody_else_writes(stand_in, monkeypatch, tmp_path):
    import os
    import tempfile

    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    folder = tmp_path / f"psmpi-cupy-{os.getuid()}"
    for given, expected in ((None, str(folder)), ("/elsewhere", "/elsewhere")):
        monkeypatch.delenv("CUPY_CACHE_DIR", raising=False)
        if given:
            monkeypatch.setenv("CUPY_CACHE_DIR", given)
        runtime.load_cupy.cache_clear()
        runtime.load_cupy()
        assert os.environ["CUPY_CACHE_DIR"] == expected
    folder.chmod(0o777)
    monkeypatch.delenv("CUPY_CACHE_DIR")
    runtime.load_cupy.cache_clear()
    runtime.load_cupy()
    assert "CUPY_CACHE_DIR" not in os.environ
