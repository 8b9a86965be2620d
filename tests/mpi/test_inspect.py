"""psmpi.inspect: its reports, the damage that it finds, and the files that it writes."""

import json
import os
import re

import h5py
import numpy as np
import pytest
from helpers.processes import launch
from helpers.runs import run
from scipy.signal import correlate
from scipy.special import expit

from psmpi import checkpoint
from psmpi.checkpoint.format import seal
from psmpi.inspect.export import make_model
from psmpi.inspect.opened import Opened

# Several kinds of layers; the 2 groups of the second convolution do not line up with the 10 classes.
LAYERS = """
[model]
model = "custom"
layers = [
  {type = "separable_conv", channels = 6, kernel = 3, groups = 1},
  {type = "max_pool", size = 2},
  {type = "relu"},
  {type = "separable_conv", channels = 20, kernel = 2, groups = 2},
  {type = "tanh"},
  {type = "flatten"},
  {type = "dense", units = 40},
  {type = "sigmoid"},
  {type = "separable_dense", units = 30, groups = 10},
  {type = "sigmoid"},
  {type = "separable_dense", units = 10, groups = 10},
]
"""


def inspect(*arguments, cwd=None):
    status, out, err = run(1, "-m", "psmpi.inspect", *arguments, cwd=cwd)
    assert "Traceback" not in err, err
    return status, out, err


def output_of(*arguments):
    status, out, err = inspect(*arguments)
    assert status == 0, err
    return out


def report_of(*arguments):
    return json.loads(output_of(*arguments, "--json"))


def refused(*arguments):
    status, _, err = inspect(*arguments)
    assert status == 1
    return " ".join(err.split())


LENGTH = ("--epochs", "3", "--batch-size", "100", "--lr", "0.001")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of three epochs on four ranks."""
    out = tmp_path_factory.mktemp("trained") / "run"
    status, _, err = run(4, "-m", "psmpi.train", "--out", out, *LENGTH, "--placement", "owner")
    assert status == 0, err
    return out


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A run of the network of LAYERS."""
    folder = tmp_path_factory.mktemp("odd")
    (folder / "model.toml").write_text(LAYERS)
    status, _, err = run(1, "-m", "psmpi.train", "--config", folder / "model.toml", "--out", folder / "run", "--max-steps", "5")  # fmt: skip  # noqa: E501
    assert status == 0, err
    return folder / "run"


def files(out):
    return checkpoint.available(out)


def tensors(path):
    with h5py.File(path) as file:
        return {name: item[...] for name, item in file["weights"].items()}


def test_no_tool_starts_mpi(trained):
    code = (
        "import sys; from psmpi.inspect.__main__ import main; status = main(['show', sys.argv[1]]); "
        "print('mpi4py' in sys.modules, file=sys.stderr); sys.exit(status)"
    )
    status, _, err = launch(1, "-c", code, trained)
    assert (status, err.strip()) == (0, "False")


def test_show_tells_tensors_settings_and_score(trained):
    newest = files(trained)[-1]
    report = report_of("show", trained)
    accuracy = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])["test_accuracy"]
    assert (report["file"], report["step"], report["epoch"], report["accuracy"]) == (str(newest), 45, 3, accuracy)
    assert set(report["tensors"]) == {"weights", "m", "v"}
    for row in report["tensors"]["weights"]:
        values = tensors(newest)[row["name"]]
        assert (tuple(row["shape"]), row["bytes"]) == (values.shape, values.nbytes)
        assert row["norm"] == pytest.approx(np.linalg.norm(values.ravel()))
    assert report["config"]["masters.placement"] == "owner" and report["provenance"]["ranks"] == 4
    text = output_of("show", newest)
    assert report["data"]["train"]["samples"] == 1438 and "1,438 training samples and 359 test samples" in text
    assert "step 45, epoch 3" in text and f"{100 * accuracy:.2f} %" in text
    assert "conv2.weight  float32 30 x 12 x 3 x 3" in text and "placement = 'owner'" in text


def test_list_and_verify_tell_whole_from_damaged(trained, tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    for path in files(trained):
        (folder / path.name).write_bytes(path.read_bytes())
    good, cut, changed = files(tmp_path / "run")
    cut.write_bytes(cut.read_bytes()[:-1])
    data = bytearray(changed.read_bytes())
    with h5py.File(changed) as file:
        offset = file["weights/dense1.weight"].id.get_chunk_info(0).byte_offset
    data[offset + 5] ^= 1
    changed.write_bytes(data)

    rows = report_of("list", tmp_path / "run")
    assert [row["step"] for row in rows] == [15, 30, 45]
    assert [row["epoch"] for row in rows] == [1, None, None]
    assert [row["state"] for row in rows] == ["whole", "damaged", "damaged"]
    assert [row["bytes"] for row in rows] == [path.stat().st_size for path in (good, cut, changed)]
    assert output_of("list", tmp_path / "run").count("damaged") == 2

    assert inspect("verify", good)[0] == 0
    status, out, _ = inspect("verify", tmp_path / "run")
    assert status == 1 and f"{good}: whole" in out and "cut short" in out
    assert "SHA-256" in out and "weights/dense1.weight" in out.splitlines()[-1]
    status, out, _ = inspect("verify", good, changed, "--json")
    assert status == 1 and [row["state"] for row in json.loads(out)] == ["whole", "damaged"]
    assert inspect("verify", tmp_path / "none.h5")[0] == 1
    assert "at least one" in refused("verify")


def test_a_tensor_that_is_gone_is_damage(trained, tmp_path):
    """The digest of the file is right, but a tensor of its layout is missing."""
    path = tmp_path / "less.h5"
    path.write_bytes(files(trained)[0].read_bytes())
    with h5py.File(path, "r+") as file:
        del file["optimizer/v/dense1.bias"]
    seal(path)
    status, out, _ = inspect("verify", path)
    assert status == 1 and "optimizer/v/dense1.bias" in out


def altered(path, target, change):
    """Write a changed copy of a checkpoint with a digest that fits; return its path."""
    target.write_bytes(path.read_bytes())
    with h5py.File(target, "r+") as file:
        change(file)
    seal(target)
    return target


def text(file, name, value):
    if name in file:
        del file[name]
    file.create_dataset(name, data=[value], dtype=h5py.string_dtype("utf-8", max(1, len(value))))


def layout(file, old, new):
    text(file, "layout", file["layout"].asstr()[0].replace(old, new))


def tensor(file, shape, dtype):
    del file["weights/conv1.bias"]
    file.create_dataset("weights/conv1.bias", shape, dtype)


def broken(file, name):
    """Change a byte of a chunk without its checksum."""
    filters, data = file[name].id.read_direct_chunk((0,) * file[name].ndim)
    file[name].id.write_direct_chunk((0,) * file[name].ndim, bytes([data[0] ^ 1]) + data[1:], filters)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda file: text(file, "metrics", "[1, 2]\n"), "FORMAT.md"),
        (lambda file: text(file, "metrics", '{"test_accuracy": "good"}\n'), "FORMAT.md"),
        (lambda file: text(file, "config", "[run"), "FORMAT.md"),
        (lambda file: text(file, "scalars", "[]"), "FORMAT.md"),
        (lambda file: text(file, "provenance", "7"), "FORMAT.md"),
        (lambda file: text(file, "progress", '{"step": -1}'), "FORMAT.md"),
        (lambda file: text(file, "progress", "[" * 100_000), "FORMAT.md"),
        (lambda file: text(file, "part", "[[1]]"), "FORMAT.md"),
        (
            lambda file: text(file, "layout", file["layout"].asstr()[0].replace('"units": 12', '"units": 5')),
            "FORMAT.md",
        ),
        (lambda file: text(file, "layout", file["layout"].asstr()[0].replace('"start": 0', '"start": 1')), "FORMAT.md"),
        (lambda file: file.pop("weights"), "weights/conv1.weight is missing"),
        (lambda file: broken(file, "weights/dense1.weight"), "weights/dense1.weight"),
        (
            lambda file: (
                file.pop("weights/conv1.bias"),
                file.create_dataset("weights/conv1.bias", data=np.zeros(12, "c8")),
            ),
            "complex64",
        ),
        (
            lambda file: (
                file.pop("weights/conv1.bias"),
                file.create_dataset("weights/conv1.bias", data=np.zeros(13, "f4")),
            ),
            "(13,)",
        ),
    ],
    ids=range(14),
)
def test_contents_that_make_no_sense_are_damage(trained, tmp_path, change, says):
    """The digest fits; every tool names the file, and --resume auto goes on from the checkpoint before it."""
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    first, second = files(trained)[:2]
    (folder / first.name).write_bytes(first.read_bytes())
    path = altered(second, folder / second.name, change)
    status, out, _ = inspect("verify", path)
    assert status == 1 and says in out
    assert [row["state"] for row in report_of("list", tmp_path / "run")] == ["whole", "damaged"]
    for command in ("show", "stats"):
        assert str(path) in refused(command, path)
    if "dense1" not in says:
        options = ("--out", tmp_path / "run", "--resume", "auto", "--max-steps", "16", "--placement", "owner")
        status, stdout, err = run(1, "-m", "psmpi.train", *options)
        assert status == 0 and "step 15" in stdout and "passed over" in stdout, err


def test_a_damaged_text_is_named(trained, tmp_path):
    path = tmp_path / "x.h5"
    data = bytearray(files(trained)[0].read_bytes())
    offset = data.index(b"[optimization]")
    data[offset + 3] ^= 4
    path.write_bytes(data)
    status, out, _ = inspect("verify", path)
    assert status == 1 and "config" in out.splitlines()[-1]
    status, _, err = run(1, "-m", "psmpi.train", "--resume", path, "--out", tmp_path / "run")
    assert status == 1 and "data that cannot be read: config" in " ".join(err.split())


def test_a_file_of_a_newer_format_is_left_alone(trained, tmp_path):
    """A newer psmpi may read the file, so no command renames or removes it."""
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    for path in files(trained):
        (folder / path.name).write_bytes(path.read_bytes())
    newest = files(tmp_path / "run")[-1]
    newest.write_bytes(newest.read_bytes().replace(b"psmpi checkpoint 2", b"psmpi checkpoint 3", 1))
    assert [row["state"] for row in report_of("list", tmp_path / "run")] == ["whole", "whole", "unreadable"]
    assert "removed" in output_of("prune", tmp_path / "run", "--keep", "1")
    assert [path.name for path in files(tmp_path / "run")] == ["step-000000030.h5", "step-000000045.h5"]
    status, _, err = run(1, "-m", "psmpi.train", "--out", tmp_path / "run", "--resume", "auto")
    assert status == 1 and "install a newer psmpi" in err
    assert len(files(tmp_path / "run")) == 2


def test_the_folder_of_checkpoints_stands_for_its_run(trained):
    folder = trained / "checkpoints"
    assert report_of("show", folder)["step"] == 45 and len(report_of("list", folder)) == 3
    assert output_of("verify", folder).count("whole") == 3


def test_stats_are_those_of_numpy(trained, tmp_path):
    newest = files(trained)[-1]
    report = report_of("stats", trained)
    for row in report["tensors"]:
        values = tensors(newest)[row["name"]].astype(float)
        counts, edges = np.histogram(values, bins=24)
        assert row["mean"] == pytest.approx(values.mean()) and row["spread"] == pytest.approx(values.std())
        assert (row["least"], row["most"], row["count"]) == (values.min(), values.max(), values.size)
        assert row["histogram"]["counts"] == counts.tolist()
        assert row["histogram"]["edges"] == pytest.approx(edges)
    layout = checkpoint.read_contents(newest).layout
    w = np.empty(layout.size, np.float32)
    checkpoint.load(newest, layout, layout.part(range(10)), {"weights": w})
    blocks = {"shared by all" if len(b.classes) == 10 else f"class {min(b.classes)}": w[b.start : b.stop] for b in layout.blocks}  # fmt: skip  # noqa: E501
    assert [row["name"] for row in report["parts"]] == list(blocks)
    for row in report["parts"]:
        assert row["count"] == blocks[row["name"]].size
        assert row["norm"] == pytest.approx(np.linalg.norm(blocks[row["name"]].astype(float)))
    assert "choose one of weights, m, v" in refused("stats", trained, "--vector", "nothing")
    output_of("stats", trained, "--vector", "m", "--plot", tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_stats_of_many_classes_show_few_and_count_all(tmp_path):
    """Of 60 classes the text shows three, and the one with a NaN; the JSON has all."""
    x, y = np.random.default_rng(0).random((120, 5)), np.arange(120) % 60
    np.savez(tmp_path / "many.npz", x=x, y=y, x_test=x[:60], y_test=y[:60])
    options = ("--dataset", tmp_path / "many.npz", "--model", "head", "--widths", "4", "--epochs", "1")
    status, _, err = run(3, "-m", "psmpi.train", *options, "--out", tmp_path / "run")
    assert status == 0, err
    path = files(tmp_path / "run")[-1]
    with h5py.File(path, "r+") as file:
        file["weights/dense2.bias"][17] = np.nan
    seal(path)
    parts, w = report_of("stats", path)["parts"], tensors(path)
    rows = np.column_stack([w["dense2.weight"], w["dense2.bias"]]).astype(float)
    rows[17, 4] = 0
    norms = np.linalg.norm(rows, axis=1)
    assert [row["name"] for row in parts] == ["shared by all", *(f"class {c}" for c in range(60))]
    assert [row["norm"] for row in parts[1:]] == pytest.approx(norms.tolist())
    assert [row["nan"] for row in parts] == [0] * 18 + [1] + [0] * 42
    summary = " ".join(output_of("stats", path).split())
    order = np.argsort(norms)
    for which, c in (("least", order[0]), ("median", order[30]), ("largest", order[-1])):
        assert f"class {c}, the {which} norm of 60 classes" in summary
    assert set(re.findall(r"class (\d+)", summary)) == {"17", *(str(order[k]) for k in (0, 30, -1))}


def test_stats_count_what_is_not_a_number(trained, tmp_path):
    path = tmp_path / "nan.h5"
    path.write_bytes(files(trained)[0].read_bytes())
    with h5py.File(path, "r+") as file:
        file["weights/conv1.bias"][:3] = [np.nan, np.inf, -np.inf]
    seal(path)
    row = next(row for row in report_of("stats", path)["tensors"] if row["name"] == "conv1.bias")
    values = tensors(path)["conv1.bias"]
    assert (row["nan"], row["infinite"]) == (1, 2)
    assert row["mean"] == pytest.approx(values[3:].mean())


def test_diff_orders_tensors_and_names_settings(trained, odd):
    first, _, last = files(trained)
    report = report_of("diff", first, last)
    distances = [row["distance"] for row in report["tensors"]]
    assert distances == sorted(distances, reverse=True) and not report["identical"] and not report["unmatched"]
    a, b = tensors(first)["conv2.weight"], tensors(last)["conv2.weight"]
    row = next(row for row in report["tensors"] if row["name"] == "weights/conv2.weight")
    assert row["distance"] == pytest.approx(np.linalg.norm((a - b).ravel()) / np.linalg.norm(a.ravel()), rel=1e-5)
    assert row["largest"] == pytest.approx(abs(a - b).max())
    assert report_of("diff", last, last)["identical"]
    other_report = report_of("diff", trained, odd)
    assert other_report["config"]["model.model"] == ["psnet", "custom"]
    assert {"name": "weights/dense3.weight", "first": None, "second": [10, 1, 3]} in other_report["unmatched"]
    assert "model.model: 'psnet' in the first, 'custom' in the second" in output_of("diff", trained, odd)


def scores_by_scipy(weights, x):
    """Return the scores of the network of LAYERS for x (b, 1, 8, 8), from tensors by name, with SciPy's correlation."""

    def conv(x, name, groups):
        w, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        inputs, outputs = x.shape[1] // groups, len(w) // groups
        maps = [
            sum(
                correlate(x[:, u // outputs * inputs + c], w[u, c][None], "valid", "direct") for c in range(inputs)
            ) + bias[u]
            for u in range(len(w))
        ]  # fmt: skip
        return np.stack(maps, axis=1)

    x = conv(x, "conv1", 1)
    b, c, h, w = x.shape
    x = np.maximum(x.reshape(b, c, h // 2, 2, w // 2, 2).max(axis=(3, 5)), 0)
    x = np.tanh(conv(x, "conv2", 2)).reshape(b, -1)
    x = expit(x @ weights["dense1.weight"].T + weights["dense1.bias"])
    x = expit(np.einsum("bgi,goi->bgo", x.reshape(b, 10, 4), weights["dense2.weight"]).reshape(b, -1) + weights["dense2.bias"])  # fmt: skip  # noqa: E501
    return np.einsum("bgi,goi->bgo", x.reshape(b, 10, 3), weights["dense3.weight"]).reshape(b, -1) + weights["dense3.bias"]  # fmt: skip  # noqa: E501


def test_exports_compute_the_same_scores_elsewhere(odd, tmp_path):
    """Compare SciPy on the .npz and onnxruntime on the .onnx with psmpi's forward pass."""
    onnxruntime = pytest.importorskip("onnxruntime")
    x = np.random.default_rng(0).random((7, 1, 8, 8), np.float32)
    own_scores = (
        make_model(Opened(odd), np.dtype(np.float32)).forward(np.ascontiguousarray(x.reshape(7, -1).T)).scores.T
    )
    output_of("export", odd, "--out", tmp_path / "w.npz")
    scores = scores_by_scipy(dict(np.load(tmp_path / "w.npz")), x)
    assert abs(scores - own_scores).max() <= 1e-5 * abs(own_scores).max()
    assert "differ from psmpi's by" in output_of("export", odd, "--out", tmp_path / "net.onnx")
    scores = onnxruntime.InferenceSession(tmp_path / "net.onnx").run(None, {"x": x})[0]
    assert abs(scores - own_scores).max() <= 1e-5 * abs(own_scores).max()


@pytest.mark.parametrize("classes", [(3,), (0, 9), (2, 3, 7)])
@pytest.mark.parametrize("which", ["trained", "odd"])
def test_a_part_scores_its_classes_as_the_whole_does(request, tmp_path, which, classes):
    onnxruntime = pytest.importorskip("onnxruntime")
    out = request.getfixturevalue(which)
    x = np.random.default_rng(0).random((7, 1, 8, 8), np.float32)
    own_scores = (
        make_model(Opened(out), np.dtype(np.float32)).forward(np.ascontiguousarray(x.reshape(7, -1).T)).scores.T
    )
    output_of("cut", out, "--classes", *map(str, classes), "--out", tmp_path / "part.h5", "--weights-only")
    output_of("export", tmp_path / "part.h5", "--out", tmp_path / "part.onnx")
    part_scores = onnxruntime.InferenceSession(tmp_path / "part.onnx").run(None, {"x": x})[0]
    assert abs(part_scores - own_scores[:, list(classes)]).max() <= 1e-5 * abs(own_scores).max()
    part_size = sum(t.size for t in tensors(tmp_path / "part.h5").values())
    assert part_size <= checkpoint.read_contents(files(out)[-1]).layout.part(classes).size


def test_exports_match_pytorch(trained, tmp_path):
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    output_of("export", trained, "--out", tmp_path / "w.npz")
    w = {name: torch.from_numpy(values) for name, values in np.load(tmp_path / "w.npz").items()}
    x = torch.rand(9, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    y = torch.sigmoid(functional.conv2d(x, w["conv1.weight"], w["conv1.bias"]))
    y = torch.sigmoid(functional.avg_pool2d(functional.conv2d(y, w["conv2.weight"], w["conv2.bias"]), 2)).flatten(1)
    for name in ("dense1", "dense2"):
        weight = w[f"{name}.weight"]
        groups, _, inputs = weight.shape
        # A block-diagonal layer is a grouped 1 x 1 convolution.
        y = functional.conv2d(y[:, :, None, None], weight.reshape(-1, inputs, 1, 1), w[f"{name}.bias"], groups=groups)
        y = torch.sigmoid(y.flatten(1)) if name == "dense1" else y.flatten(1)
    own_scores = (
        make_model(Opened(trained), np.dtype(np.float32))
        .forward(np.ascontiguousarray(x.reshape(9, -1).numpy().T))
        .scores
    )
    assert abs(y.numpy() - own_scores.T).max() <= 1e-5 * abs(own_scores).max()


def test_safetensors_hold_the_same_bits(trained, tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    output_of("export", trained, "--out", tmp_path / "w.safetensors")
    loaded = safetensors.load_file(tmp_path / "w.safetensors")
    expected = tensors(files(trained)[-1])
    assert loaded.keys() == expected.keys()
    assert all(np.array_equal(loaded[name], expected[name]) for name in expected)


def test_parts_make_the_whole_file_again(trained, tmp_path):
    newest = files(trained)[-1]
    groups = ((0, 1), (2,), (3, 4, 5), (6, 7), (8, 9), (9,))
    for k, classes in enumerate(groups):
        output_of("cut", newest, "--classes", *map(str, classes), "--out", tmp_path / f"{k}.h5")
    parts = [tmp_path / f"{k}.h5" for k in range(len(groups))]
    output_of("join", *parts, "--out", tmp_path / "all.h5")
    assert (tmp_path / "all.h5").read_bytes() == newest.read_bytes()
    assert "the part of the classes 2 is not among" in refused("join", parts[0], *parts[2:], "--out", tmp_path / "x.h5")
    assert "is there already" in refused("join", *parts, "--out", tmp_path / "all.h5")
    output_of("cut", files(trained)[0], "--classes", "2", "--out", tmp_path / "old.h5")
    message = refused("join", parts[0], tmp_path / "old.h5", *parts[2:], "--out", tmp_path / "x.h5")
    assert "parts of different checkpoints" in message
    assert "has 2" in refused("cut", parts[1], "--classes", "3", "--out", tmp_path / "x.h5")
    status, _, err = run(1, "-m", "psmpi.train", "--resume", parts[1], "--out", tmp_path / "run")
    assert status == 1 and "holds only the part of the classes 2" in " ".join(err.split())


def test_what_no_class_uses_survives_cutting(tmp_path):
    """Ten groups of 12 inputs use 120 of 128 flattened values, so the last channels feed no score."""
    model = LAYERS.replace("channels = 20, kernel = 2, groups = 2", "channels = 16, kernel = 2, groups = 1").replace(
        '  {type = "dense", units = 40},\n  {type = "sigmoid"},\n', ""
    )
    (tmp_path / "model.toml").write_text(model)
    options = ("--config", tmp_path / "model.toml", "--out", tmp_path / "run", "--max-steps", "2")
    status, _, err = run(1, "-m", "psmpi.train", *options)
    assert status == 0, err
    (full_file,) = files(tmp_path / "run")
    assert checkpoint.read_contents(full_file).layout.dead.size > 0
    for c in range(10):
        output_of("cut", full_file, "--classes", str(c), "--out", tmp_path / f"{c}.h5")
    output_of("join", *(tmp_path / f"{c}.h5" for c in range(10)), "--out", tmp_path / "all.h5")
    assert (tmp_path / "all.h5").read_bytes() == full_file.read_bytes()


def test_average_is_the_mean_of_weights_alone(trained, odd, tmp_path):
    paths = files(trained)
    output_of("average", *paths, "--out", tmp_path / "mean.h5")
    mean = tensors(tmp_path / "mean.h5")
    for name, values in mean.items():
        assert np.allclose(values, np.mean([tensors(p)[name].astype(float) for p in paths], axis=0), rtol=1e-6)
    report = report_of("show", tmp_path / "mean.h5")
    assert list(report["tensors"]) == ["weights"] and report["provenance"]["average_of"] == [str(p) for p in paths]
    assert inspect("verify", tmp_path / "mean.h5")[0] == 0
    assert "are of different networks" in refused("average", paths[0], odd, "--out", tmp_path / "x.h5")
    options = ("--resume", tmp_path / "mean.h5", "--out", tmp_path / "run", "--epochs", "4")
    status, stdout, err = run(3, "-m", "psmpi.train", *options)
    assert status == 0 and "optimizer has no vectors, these settings have m v: the optimizer starts afresh" in " ".join(
        stdout.split()
    ), err


def test_what_does_not_belong_together_is_refused(trained, tmp_path):
    paths = [tmp_path / f"{c}.h5" for c in (0, 3)]
    for path, c in zip(paths, (0, 3), strict=True):
        output_of("cut", trained, "--classes", str(c), "--out", path)
    assert "the parts of different classes" in refused("average", *paths, "--out", tmp_path / "x.h5")
    unmatched = {row["name"]: row["second"] for row in report_of("diff", *paths)["unmatched"]}
    assert unmatched["weights/conv2.weight"] == "of the classes 3" and "weights/conv1.weight" not in unmatched
    output_of("average", *files(trained), "--out", tmp_path / "mean.h5")
    output_of("cut", files(trained)[-1], "--classes", *"01234", "--out", tmp_path / "low.h5", "--weights-only")
    output_of("cut", tmp_path / "mean.h5", "--classes", *"56789", "--out", tmp_path / "high.h5")
    message = refused("join", tmp_path / "low.h5", tmp_path / "high.h5", "--out", tmp_path / "x.h5")
    assert "parts of different checkpoints" in message
    inside = trained / "checkpoints" / "step-000000099.h5"
    assert "would pass for a checkpoint" in refused("average", *files(trained), "--out", inside)


def test_a_part_of_a_part_joins_the_whole(trained, tmp_path):
    newest = files(trained)[-1]
    output_of("cut", newest, "--classes", *"01234", "--out", tmp_path / "low.h5")
    output_of("cut", newest, "--classes", *"56789", "--out", tmp_path / "high.h5")
    for c in "01234":
        output_of("cut", tmp_path / "low.h5", "--classes", c, "--out", tmp_path / f"{c}.h5")
    output_of("join", tmp_path / "high.h5", *(tmp_path / f"{c}.h5" for c in "01234"), "--out", tmp_path / "all.h5")
    assert (tmp_path / "all.h5").read_bytes() == newest.read_bytes()


def test_extreme_values_are_measured(trained, tmp_path):
    def change(file):
        file["weights/conv1.bias"][:2] = [3e38, -3e38]
        file["weights/dense2.bias"][...] = -0.0

    huge = altered(files(trained)[0], tmp_path / "huge.h5", change)
    row = next(row for row in report_of("stats", huge)["tensors"] if row["name"] == "conv1.bias")
    assert row["norm"] == pytest.approx(3e38 * 2**0.5)
    zero = altered(
        huge, tmp_path / "zero.h5", lambda file: file["weights/dense2.bias"].write_direct(np.zeros(10, "f4"))
    )
    report = report_of("diff", huge, zero)
    row = next(row for row in report["tensors"] if row["name"] == "weights/dense2.bias")
    assert (row["distance"], row["identical"], report["identical"]) == (0.0, False, False)


def test_prune_keeps_the_newest_whole_ones(trained, tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    for path in files(trained):
        (folder / path.name).write_bytes(path.read_bytes())
    newest = files(tmp_path / "run")[-1]
    newest.write_bytes(newest.read_bytes()[:-1])
    assert output_of("prune", tmp_path / "run", "--keep", "1", "--dry-run").count("would remove") == 2
    assert len(files(tmp_path / "run")) == 3
    output_of("prune", tmp_path / "run", "--keep", "1")
    assert [path.name for path in files(tmp_path / "run")] == ["step-000000030.h5"]
    path = files(tmp_path / "run")[0]
    path.write_bytes(path.read_bytes()[:-1])
    assert "nothing is removed" in refused("prune", tmp_path / "run", "--keep", "1")
    assert "--keep 0" in refused("prune", tmp_path / "run", "--keep", "0")


def test_mistakes_are_named(trained, tmp_path):
    assert "there is no such checkpoint" in refused("show", tmp_path / "none.h5")
    (tmp_path / "empty").mkdir()
    assert "no checkpoint" in refused("list", tmp_path / "empty")
    assert "ends in .npz, .safetensors, .onnx" in refused("export", trained, "--out", tmp_path / "w.pt")
    for suffix in ("npz", "safetensors", "onnx"):
        assert "nowhere" in refused("export", trained, "--out", tmp_path / "nowhere" / f"w.{suffix}")
    assert refused("show", "x" * 5000)
    if os.geteuid() != 0:
        secret = tmp_path / "secret.h5"
        secret.write_bytes(b"")
        secret.chmod(0)
        assert "Permission denied" in refused("show", secret)
