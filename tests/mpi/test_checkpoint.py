"""Checkpoints: contents, resuming on any number of ranks, and damaged or foreign files."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
import tracemalloc

import h5py
import numpy as np
import pytest
from helpers.processes import launch, start
from helpers.runs import distance, run

from psmpi import checkpoint
from psmpi.checkpoint.format import chunk_of, seal
from psmpi.comm.control import Control
from psmpi.errors import UserError
from psmpi.layout import Ownership, Runs
from psmpi.nn.zoo import make_network

STEPS = ("--dtype", "float64", "--epochs", "4")
LAYOUTS = [
    (1, ()),
    (3, ()),
    (4, ("--placement", "owner", "--masters", "3")),
    (7, ("--placement", "owner")),
    (7, ("--masters", "3")),
    (11, ("--placement", "owner", "--masters", "3")),
    (6, ("--partition", "pairs")),
]


@pytest.mark.parametrize(
    ("ranks", "layout"), [pytest.param(*case, marks=[pytest.mark.slow] * (case[0] > 4)) for case in LAYOUTS]
)
def test_a_resumed_run_ends_in_the_same_bits(train, ranks, layout):
    """Stop inside an epoch and resume on as many ranks: the weights have the same bits, and metrics agree but for
    times."""
    options = (*STEPS, *layout)
    full_run = train(ranks, *options)
    first = train(ranks, *options, "--max-steps", "22", "--checkpoint-every", "11")
    resumed = train(ranks, *options, "--resume", "auto", out=first.out)
    full_tensors, resumed_tensors = full_run.tensors(), resumed.tensors()
    assert full_tensors.keys() == resumed_tensors.keys() and all(
        np.array_equal(full_tensors[k], resumed_tensors[k]) for k in full_tensors
    )
    for a, b in zip(full_run.rows, resumed.rows, strict=True):
        for key in ("epoch", "step", "test_loss", "test_accuracy"):
            assert a[key] == b[key]
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-14)


@pytest.mark.parametrize("optimizer", ["adam", pytest.param("lbfgs", marks=pytest.mark.slow)])
def test_a_run_goes_on_at_any_ranks_masters_and_placement(train, optimizer):
    options = (*STEPS, "--optimizer", optimizer, "--lr", {"adam": "1e-3", "lbfgs": "1"}[optimizer], "--max-steps")
    full_run = train(1, *options, "40")
    first_run = train(11, *options, "25", "--placement", "owner", "--masters", "2")
    for ranks, layout in LAYOUTS[1::2] if optimizer == "adam" else LAYOUTS[2:4]:
        resumed = train(ranks, *options, "40", *layout, "--resume", first_run.checkpoint)
        assert distance(full_run.tensors(), resumed.tensors()) <= (1e-9 if optimizer == "adam" else 1e-7)


@pytest.mark.slow
def test_a_run_of_eleven_ranks_goes_on_on_any_others(train):
    """Resume on 1, 3, 4 and 7 ranks, with 1 or 3 masters and either placement."""
    full_run = train(1, *STEPS, "--max-steps", "40")
    first_checkpoint = train(11, *STEPS, "--max-steps", "25").checkpoint
    for ranks in (1, 3, 4, 7):
        for masters in (1, 3) if ranks > 1 else (1,):
            for placement in ("master", "owner"):
                layout = ["--masters", str(masters), "--placement", placement]
                # Three masters of three ranks have to compute as well.
                layout += ["--colocate"] if masters == ranks else []
                resumed = train(ranks, *STEPS, "--max-steps", "40", *layout, "--resume", first_checkpoint)
                assert distance(full_run.tensors(), resumed.tensors()) <= 1e-9


def test_loading_gives_every_rank_the_saved_bits_of_its_shard(train):
    """Save weights and moments from 7 ranks with --placement owner; read them back shard by shard and in one piece."""
    trained = train(7, "--max-steps", "5", "--placement", "owner", "--masters", "2")
    layout = make_network("psnet", (1, 8, 8), 10).layout()

    def load(runs):
        vectors = {name: np.empty(runs.size, np.float32) for name in ("weights", "m", "v")}
        checkpoint.load(trained.checkpoint, layout, runs, vectors)
        return vectors

    full_vectors = load(Runs(((0, layout.size),)))
    for shard in Runs(((0, layout.size),)).split(7):
        for name, vector in load(shard).items():
            assert np.array_equal(vector, np.concatenate([full_vectors[name][a:b] for a, b in shard.intervals]))
    tensors = trained.tensors()
    assert sum(t.size for name, t in tensors.items() if name.startswith("weights/")) == layout.size
    assert {name: tensors[f"weights/{name}"].shape for name in ("conv1.weight", "dense1.weight")} == {
        p.name: p.shape for p in layout.parameters if p.name in ("conv1.weight", "dense1.weight")
    }


def tensors_of(item):
    """Return the HDF5 data sets of a group and its subgroups; none for a data set."""
    datasets = []
    if isinstance(item, h5py.Group):
        item.visititems(lambda name, child: datasets.append(child) if isinstance(child, h5py.Dataset) else None)
    return datasets


def test_checkpoints_hold_names_shapes_progress_and_configuration(train):
    trained = train(3, "--epochs", "2", "--seed", "5")
    with h5py.File(trained.checkpoint) as file:
        assert file["weights/conv1.weight"].shape == (12, 1, 3, 3)
        assert file["weights/dense1.weight"].shape == (10, 10, 12)
        assert set(file["optimizer"]) == {"m", "v"}
        assert json.loads(file["scalars"].asstr()[0]) == {"t": 30}
        assert all(item.fletcher32 and item.chunks for group in file.values() for item in tensors_of(group))
    contents = checkpoint.read_contents(trained.checkpoint)
    progress = contents.progress
    assert (progress.step, progress.epoch, progress.cursor, progress.rows) == (30, 2, 0, tuple(trained.rows))
    assert "seed = 5" in contents.config
    assert contents.layout == make_network("psnet", (1, 8, 8), 10).layout()
    assert contents.random["seed"] == 5
    assert contents.placement["masters"] == 1 and len(contents.placement["ranks"]) == 3
    assert contents.provenance["ranks"] == 3 and contents.provenance["versions"]["numpy"] == np.__version__
    assert "seed = 5" in (trained.out / "config.toml").read_text()


def test_only_the_newest_checkpoints_are_kept(train):
    options = ("--epochs", "2", "--checkpoint-every", "4", "--checkpoint-keep", "2")
    names = [path.name for path in checkpoint.available(train(1, *options).out)]
    assert names == ["step-000000028.h5", "step-000000030.h5"]


def test_auto_passes_over_a_damaged_checkpoint(train):
    trained = train(1, "--epochs", "3")
    newest = checkpoint.available(trained.out)[-1]
    newest.write_bytes(newest.read_bytes()[:1000])
    resumed = train(1, "--epochs", "3", "--resume", "auto", out=trained.out)
    assert "step-000000030.h5, step 30" in " ".join(resumed.stdout.split())
    assert newest.with_name(newest.name + ".damaged").exists()
    assert [row["epoch"] for row in resumed.rows] == [1, 2, 3]


ONCE = ("--epochs", "1", "--batch-size", "100")


def test_auto_starts_afresh_where_there_is_nothing(train, tmp_path):
    assert train(1, *ONCE, "--resume", "auto", out=tmp_path / "new").rows[-1]["step"] == 15


def refusal(tmp_path, *options):
    status, out, err = run(1, "-m", "psmpi.train", "--out", tmp_path / "other", *options, cwd=tmp_path)
    assert status == 1 and "Traceback" not in err, err + out
    return " ".join(err.split())


def test_foreign_and_damaged_files_are_named(train, tmp_path):
    good_file = train(1, "--epochs", "1").checkpoint
    assert "there is no such checkpoint" in refusal(tmp_path, "--resume", tmp_path / "none.h5")
    text = tmp_path / "text.h5"
    text.write_text("not HDF5")
    assert "is not a psmpi checkpoint" in refusal(tmp_path, "--resume", text)
    with h5py.File(tmp_path / "plain.h5", "w") as file:
        file["x"] = np.zeros(3)
    assert "HDF5 but not a psmpi checkpoint" in refusal(tmp_path, "--resume", tmp_path / "plain.h5")
    newer = tmp_path / "newer.h5"
    newer.write_bytes(good_file.read_bytes().replace(b"psmpi checkpoint 2", b"psmpi checkpoint 3", 1))
    assert "has format 3" in refusal(tmp_path, "--resume", newer)
    changed_file = tmp_path / "shape.h5"
    shutil.copy(good_file, changed_file)
    with h5py.File(changed_file, "r+") as file:
        del file["weights/dense1.weight"]
        file["weights/dense1.weight"] = np.zeros((2, 3))
    assert "is damaged" in refusal(tmp_path, "--resume", changed_file)
    seal(changed_file)
    message = refusal(tmp_path, "--resume", changed_file)
    assert "weights/dense1.weight" in message and "(2, 3)" in message and "its layout says (10, 10, 12)" in message
    missing = refusal(tmp_path, "--resume", good_file, "--model", "mlp", "--widths", "8")
    assert "has no weights/" in missing or "in the model" in missing


def test_another_optimizer_takes_the_weights_alone(train):
    """Adam's second moments and momentum's velocity are different vectors, though both are called v."""
    first = train(1, "--epochs", "1")
    options = ("--epochs", "2", "--optimizer", "momentum", "--resume", first.checkpoint)
    resumed = train(3, *options)
    assert "the checkpoint is of adam, not of momentum: the optimizer starts afresh" in resumed.stdout


def test_a_run_does_not_go_on_among_later_checkpoints(train, tmp_path):
    """Later checkpoints in the folder would be mistaken for newer ones of the resumed run."""
    first_run = train(1, "--epochs", "3")
    early = checkpoint.available(first_run.out)[0]
    status, _, err = run(
        1, "-m", "psmpi.train", "--out", first_run.out, "--resume", early, "--epochs", "2", cwd=tmp_path
    )
    assert status == 1 and "holds checkpoints of later steps than 15, up to step-000000045.h5" in " ".join(err.split())
    for path in checkpoint.available(first_run.out):
        path.write_bytes(path.read_bytes()[:-1])
    options = ("-m", "psmpi.train", "--out", first_run.out, "--resume", "auto")
    status, _, err = run(1, *options, cwd=tmp_path)
    assert status == 1 and "are all damaged" in " ".join(err.split())
    assert len(checkpoint.available(first_run.out)) == 3


def test_inside_an_epoch_the_order_of_samples_is_fixed(train, tmp_path):
    """Resuming with another order or number of samples would repeat some samples and skip others."""
    half = train(1, "--epochs", "1", "--max-steps", "8").checkpoint
    assert "--seed 0" in refusal(tmp_path, "--resume", half, "--seed", "1")
    assert "8 steps into epoch 1" in refusal(tmp_path, "--resume", half, "--no-shuffle")
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "few.npz", x=rng.random((500, 8, 8)), y=np.arange(500) % 10)
    message = refusal(tmp_path, "--resume", half, "--dataset", tmp_path / "few.npz", "--new-data")
    assert "1,438 training samples, there 400" in message and "8 steps into epoch 1" in message
    assert "--batch-size 100" in refusal(tmp_path, "--resume", half, "--batch-size", "50")


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (4, ("--replicas", "3")),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, ()), (4, ("--partition", "pairs")))),
    ],
)
def test_a_resumed_run_of_larger_images_ends_in_the_same_bits(train, tmp_path, ranks, layout):
    """Convolutions of larger images run in chunks; the number of chunks must not depend on earlier computations."""
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "x.npz", x=rng.integers(0, 256, (400, 28, 28)).astype(np.uint8), y=np.arange(400) % 10)
    options = ("--dataset", tmp_path / "x.npz", "--batch-size", "20", "--epochs", "3", *layout)
    full_run = train(ranks, *options)
    first = train(ranks, *options, "--max-steps", "21")
    resumed = train(ranks, *options, "--resume", "auto", out=first.out)
    full_tensors, resumed_tensors = full_run.tensors(), resumed.tensors()
    assert all(np.array_equal(full_tensors[k], resumed_tensors[k]) for k in full_tensors)


def test_a_run_is_not_overwritten_by_another(train, tmp_path):
    out = train(1, "--epochs", "1").out
    status, _, err = run(1, "-m", "psmpi.train", "--out", out, "--epochs", "1")
    assert status == 1 and "--resume auto" in err


def test_leftovers_of_a_killed_writer_are_removed(train, tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / ".step-000000007.h5.part").write_bytes(b"half")
    train(1, "--epochs", "1", out=tmp_path / "run")
    assert [path.name for path in folder.iterdir()] == ["step-000000015.h5"]


def test_resuming_tells_what_differs_and_what_cannot(train, tmp_path):
    first = train(1, "--epochs", "2")
    changed = train(1, "--epochs", "3", "--lr", "0.01", "--resume", first.checkpoint)
    assert "note: lr is 0.01, in the checkpoint it was 0.001" in changed.stdout
    assert [row["epoch"] for row in changed.rows] == [1, 2, 3]
    resumed = train(1, "--epochs", "2", "--resume", "auto", out=first.out)
    assert "nothing left to do" in resumed.stdout and resumed.rows == first.rows


@pytest.fixture
def alone(tmp_path):
    """alone(network, **options): a checkpoint writer on one rank, of the small PSNet by default, and random vectors for
    it."""
    writers = []

    class Alone:
        rank, size = 0, 1

    def call(network=None, **options):
        network = network or make_network("psnet", (1, 8, 8), 10)
        layout = network.layout()
        contents = checkpoint.Contents("seed = 1", network.in_shape, layout)
        writers.append(
            checkpoint.Writer(Control(Alone()), contents, Ownership((Runs(((0, layout.size),)),)), tmp_path, **options)
        )
        rng = np.random.default_rng(3)
        return writers[-1], {name: rng.standard_normal(layout.size) for name in ("weights", "m")}

    yield call
    for writer in writers:
        # A failed test may leave its writing process stopped.
        writer.spool.kill()
        writer.close()


def test_long_runs_keep_their_metrics(alone, tmp_path):
    """The rows of a thousand epochs exceed 64 kB, the limit of an HDF5 attribute."""
    writer, vectors = alone()
    progress = checkpoint.Progress(step=1000, rows=tuple({"epoch": k, "note": "x" * 200} for k in range(1000)))
    writer.write(vectors, {}, progress)
    writer.close()
    assert writer.troubles() == []
    assert checkpoint.read_contents(checkpoint.available(tmp_path)[0]).progress == progress


def test_the_newest_of_a_folder_is_found(train):
    out = train(1, "--epochs", "2").out
    assert checkpoint.find(str(out), out, print).name == "step-000000030.h5"
    assert checkpoint.find(str(out / "checkpoints"), out, print).name == "step-000000030.h5"
    with pytest.raises(UserError, match="no checkpoint in"):
        checkpoint.find(str(out.parent), out, print)


def read_back(path, vectors):
    layout = checkpoint.read_contents(path).layout
    loaded = {name: np.empty_like(vector) for name, vector in vectors.items()}
    checkpoint.load(path, layout, Runs(((0, layout.size),)), loaded)
    return loaded


@pytest.mark.parametrize("gzip", [0, 4])
def test_what_is_saved_is_the_state_of_that_step(alone, tmp_path, gzip):
    """Vectors that change right after the call do not change the file."""
    writer, vectors = alone(gzip=gzip)
    saved = {name: vector.copy() for name, vector in vectors.items()}
    writer.write(vectors, {"t": 3}, checkpoint.Progress(step=3))
    for vector in vectors.values():
        vector.fill(0)
    writer.close()
    path = checkpoint.available(tmp_path)[0]
    checkpoint.check_file(path)
    loaded = read_back(path, vectors)
    assert all(np.array_equal(loaded[name], saved[name]) for name in saved)
    assert checkpoint.read_contents(path).scalars == {"t": 3}
    with h5py.File(path) as file:
        assert file["weights/dense1.weight"].compression == ("gzip" if gzip else None)


@pytest.mark.parametrize("shape", [(1,), (7, 3), (3, 400_000), (10, 700, 512), (2, 2, 3_000_000)])
def test_chunks_are_bounded_and_fit(shape):
    chunk = chunk_of(shape)
    assert all(1 <= c <= s for c, s in zip(chunk, shape, strict=True))
    assert np.prod(chunk) <= 1 << 18
    assert np.prod(chunk) * 2 > min(np.prod(shape), 1 << 18) or chunk[0] == shape[0] or len(shape) > 1


def test_a_lost_folder_is_made_again_and_a_blocked_one_is_told(alone, tmp_path):
    writer, vectors = alone()
    writer.write(vectors, {}, checkpoint.Progress(step=1))
    writer.finish()
    shutil.rmtree(checkpoint.folder(tmp_path))
    writer.write(vectors, {}, checkpoint.Progress(step=2))
    writer.finish()
    assert writer.troubles() == []
    assert [p.name for p in checkpoint.available(tmp_path)] == ["step-000000002.h5"]
    shutil.rmtree(checkpoint.folder(tmp_path))
    checkpoint.folder(tmp_path).write_text("a file where the folder should be")
    writer.write(vectors, {}, checkpoint.Progress(step=3))
    (trouble,) = writer.troubles()
    assert "step-000000003.h5 is NOT written" in trouble and "step-000000002.h5" in trouble
    writer.close()


def test_a_killed_writing_process_is_told_and_replaced(alone, tmp_path):
    writer, vectors = alone()
    writer.write(vectors, {}, checkpoint.Progress(step=1))
    writer.finish()
    os.kill(writer.spool.process.pid, signal.SIGSTOP)
    writer.write(vectors, {}, checkpoint.Progress(step=2))
    assert writer.busy
    writer.spool.process.kill()
    writer.finish()
    (trouble,) = writer.troubles()
    assert "step-000000002.h5 is NOT written" in trouble and "SIGKILL" in trouble and "step-000000001.h5" in trouble
    assert writer.last_failed
    writer.write(vectors, {}, checkpoint.Progress(step=3))
    writer.finish()
    # Killed between two checkpoints, the writing process loses nothing.
    writer.spool.process.kill()
    writer.spool.process.wait()
    writer.write(vectors, {}, checkpoint.Progress(step=4))
    writer.close()
    assert writer.troubles() == [] and not writer.last_failed
    assert [int(p.stem[-1]) for p in checkpoint.available(tmp_path)] == [1, 3, 4]


def test_a_writing_process_that_hangs_costs_checkpoints_not_training(alone, monkeypatch):
    writer, vectors = alone()
    writer.write(vectors, {}, checkpoint.Progress(step=1))
    writer.finish()
    monkeypatch.setattr("psmpi.checkpoint.writer.PATIENCE", 0.2)
    monkeypatch.setattr("psmpi.checkpoint.writer.LAST_PATIENCE", 0.5)
    os.kill(writer.spool.process.pid, signal.SIGSTOP)
    start_time = time.monotonic()
    for step in range(2, 12):
        writer.write(vectors, {}, checkpoint.Progress(step=step))
    assert time.monotonic() - start_time < 5
    troubles = writer.troubles()
    assert len(troubles) == 9 and "step-000000002.h5 is still being written" in troubles[0]
    writer.finish(0.1)
    writer.close()
    assert "was not written within" in writer.troubles()[0] and writer.last_failed


def test_many_open_files_do_no_harm(alone):
    held = [os.open("/dev/null", os.O_RDONLY) for _ in range(1100)]
    try:
        writer, vectors = alone()
        writer.write(vectors, {}, checkpoint.Progress(step=1))
        assert writer.troubles() == []
        writer.finish()
        assert not writer.busy
    finally:
        for number in held:
            os.close(number)


def test_pruning_never_takes_what_was_just_written(alone, tmp_path):
    writer, vectors = alone(keep=1)
    for step in (7, 9):
        writer.write(vectors, {}, checkpoint.Progress(step=step))
    writer.finish()
    (checkpoint.folder(tmp_path) / "step-000000999.h5").write_bytes(b"another")
    (checkpoint.folder(tmp_path) / "step-000000001.h5").mkdir()
    writer.write(vectors, {}, checkpoint.Progress(step=10))
    writer.finish()
    assert writer.troubles() == []
    assert [path.name for path in checkpoint.available(tmp_path)] == ["step-000000010.h5", "step-000000999.h5"]


def test_a_file_under_a_wrong_name_is_no_checkpoint_of_the_run(train):
    out = train(1, "--epochs", "2").out
    last = checkpoint.available(out)[-1]
    last.rename(last.with_name("step-000000100.h5"))
    status, _, err = run(1, "-m", "psmpi.train", "--out", out, "--resume", "auto", "--epochs", "3")
    assert status == 1 and "holds step 30: it is not of this run" in " ".join(err.split())
    assert len(checkpoint.available(out)) == 2


@pytest.mark.parametrize(
    ("room", "gzip"),
    [(40_000, 0), (100_000, 1), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((40_000, 1), (100_000, 0)))],
)
def test_a_full_disk_stops_no_training(tmp_path, room, gzip):
    """A small file system is full while the vectors are copied, or while the writing process makes the file."""
    place = tmp_path / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", place]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a file system")
    try:
        ballast = place / "ballast"
        ballast.write_bytes(bytes(400_000 - room))
        options = ("--out", place / "run", "--epochs", "4", "--batch-size", "100")
        options += ("--checkpoint-gzip", str(gzip), "--max-steps")
        status, out, err = launch(1, "-m", "psmpi.train", *options, "30", cwd=tmp_path)
        assert len(re.findall(r"^epoch \d", out, re.M)) == 2 and "Traceback" not in out + err
        assert out.count("is NOT written") == 2 and "No space left" in out
        assert status == 1 and "last checkpoint is not written" in err
        assert list((place / "run" / "checkpoints").iterdir()) == []
        ballast.unlink()
        status, out, err = launch(1, "-m", "psmpi.train", *options, "15", "--resume", "auto", cwd=tmp_path)
        assert status == 0, err
        (written_file,) = checkpoint.available(place / "run")
        checkpoint.check_file(written_file)
    finally:
        subprocess.run(["umount", place], check=True)


def test_a_thousand_damaged_files_are_refused(train, tmp_path):
    """Cut a file anywhere, or change one byte: check_file refuses it in one line that names the file."""
    good_bytes = train(1, "--epochs", "1").checkpoint.read_bytes()
    rng, path = np.random.default_rng(0), tmp_path / "damaged.h5"
    for trial in range(1000):
        data = bytearray(good_bytes)
        if trial % 4 == 0:
            data = data[: rng.integers(len(data))]
        else:
            # Every fourth trial hits the short header.
            position = rng.integers(512 if trial % 4 == 1 else len(data))
            data[position] ^= rng.integers(1, 256)
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"damaged\.h5") as caught:
            checkpoint.check_file(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("moments", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_a_writing_process_killed_at_any_moment_leaves_whole_files(alone, tmp_path, moments):
    """Kill the writing process at random moments of saves that take tens of milliseconds: every file is complete, and
    the newest is of the killed save or of the one before."""
    writer, vectors = alone(make_network("mlp", (256,), 10, widths=(256, 256)), keep=2)
    for step in (1, 2):
        start_time = time.perf_counter()
        writer.write(vectors, {}, checkpoint.Progress(step=step))
        writer.finish()
        duration = time.perf_counter() - start_time
    rng, survived, last, reach = np.random.default_rng(0), 0, 2, duration
    for step in range(3, 3 + 2 * moments, 2):
        writer.write(vectors, {}, checkpoint.Progress(step=step))
        time.sleep(rng.uniform(0, reach))
        helper = writer.spool.process
        helper.kill()
        # Without the wait, the next save may find the killed process still ending.
        helper.wait()
        writer.finish()
        files = checkpoint.available(tmp_path)
        for path in files:
            checkpoint.check_file(path)
        troubles = writer.troubles()
        assert troubles == [] or "SIGKILL" in troubles[0]
        # A process killed after renaming the file and before answering has written the file.
        last, saved = (step, True) if int(files[-1].stem[5:]) == step else (last, False)
        assert int(files[-1].stem[5:]) == last and (saved or troubles)
        survived += saved
        # Adapt to the speed of the machine, so that about half of the saves finish before the kill.
        reach *= 0.9 if saved else 1.1
        # Let a new writing process start with an undisturbed save.
        writer.write(vectors, {}, checkpoint.Progress(step=step + 1))
        writer.finish()
        assert writer.troubles() == []
        last = step + 1
    assert 0.05 * moments <= survived <= 0.95 * moments, "the moments are spread over the saves"
    assert not list(checkpoint.folder(tmp_path).glob(".*"))


def test_a_run_killed_at_any_moment_goes_on(tmp_path):
    """Kill all ranks while every step is saved: files that `list` calls whole pass `verify`, and the run goes on."""
    out, rng = tmp_path / "run", np.random.default_rng(1)
    options = ("-m", "psmpi.train", "--out", out, "--epochs", "40", "--checkpoint-every", "1", "--resume", "auto")
    steps = []
    for _ in range(2):
        process = start(2, *options, cwd=tmp_path)
        first = len(list(checkpoint.folder(out).glob("*.h5")))
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            newest = [p.name for p in checkpoint.available(out)][-1:]
            if newest and newest[0] > f"step-{max(steps, default=0):09d}.h5":
                break
            time.sleep(0.02)
        assert first or checkpoint.available(out), "nothing was saved"
        time.sleep(rng.uniform(0, 0.5))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        # The writing process may outlive the ranks until its checkpoint is written, and holds their lock until then.
        time.sleep(0.3)
        status, listing, err = run(1, "-m", "psmpi.inspect", "list", out, "--json")
        assert status == 0, err
        rows = json.loads(listing)
        for row in rows:
            assert run(1, "-m", "psmpi.inspect", "verify", row["file"])[0] == 0 and row["state"] == "whole"
        steps.append(rows[-1]["step"])
    assert steps == sorted(steps) and steps[-1] > steps[0]
    status, stdout, err = launch(2, *options, "--max-steps", str(steps[-1] + 3), cwd=tmp_path)
    assert status == 0 and f"step {steps[-1]}" in stdout, err


@pytest.mark.parametrize(
    ("ranks", "placement", "classes"),
    [
        (3, "owner", 0),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, "master", 0), (1, "owner", 9000))),
    ],
)
def test_the_measurement_of_the_pause_runs(ranks, placement, classes, tmp_path):
    options = ("--megabytes", "5", "--repeats", "2", "--placement", placement, "--folder", tmp_path, "--json")
    options += ("--classes", str(classes))
    status, out, err = launch(ranks, "-m", "psmpi.bench", "checkpoint", *options)
    assert status == 0, err
    report = json.loads(out)
    assert report["megabytes"] == pytest.approx(5, rel=0.1) and 0 < report["pause_seconds"] < report["written_seconds"]
    assert report["plain_seconds"] > 0 and report["speed"] > 0
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_costs_rank_0_one_buffer_of_memory(alone):
    """The vectors have over 100 MB, and a save allocates less than 1 MB in Python."""
    writer, vectors = alone(make_network("mlp", (1024,), 10, widths=(4096, 1024)))
    assert sum(v.nbytes for v in vectors.values()) > 100e6
    writer.write(vectors, {}, checkpoint.Progress(step=1))
    writer.finish()
    tracemalloc.start()
    writer.write(vectors, {}, checkpoint.Progress(step=2))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1e6


@pytest.mark.skipif(not checkpoint.supported(), reason="h5py is not built with parallel HDF5")
@pytest.mark.parametrize("gzip", [0, 3])
@pytest.mark.parametrize("layout", [("--masters", "3"), ("--placement", "owner"), ()])
def test_ranks_write_the_same_file_together(train, layout, gzip):
    options = ("--epochs", "2", "--checkpoint-gzip", str(gzip), *layout)
    serial_run, parallel_run = train(4, *options), train(4, *options, "--checkpoint-parallel")
    serial_tensors, parallel_tensors = serial_run.tensors(), parallel_run.tensors()
    assert serial_tensors.keys() == parallel_tensors.keys() and all(
        np.array_equal(serial_tensors[k], parallel_tensors[k]) for k in serial_tensors
    )
    checkpoint.check_file(parallel_run.checkpoint)
    contents = checkpoint.read_contents(parallel_run.checkpoint)
    assert contents.progress.rows == tuple(parallel_run.rows)
    resumed = train(4, *options, "--epochs", "3", "--resume", "auto", "--checkpoint-parallel", out=parallel_run.out)
    assert [row["epoch"] for row in resumed.rows] == [1, 2, 3]


@pytest.mark.skipif(checkpoint.supported(), reason="h5py is built with parallel HDF5")
def test_writing_together_needs_parallel_hdf5(tmp_path):
    assert "this h5py has no parallel HDF5" in refusal(tmp_path, "--checkpoint-parallel")


def test_a_vector_of_another_optimizer_is_not_taken_for_one_of_the_same_name(train, tmp_path):
    """RMSprop starts its v afresh, both from a checkpoint of momentum, which has a vector v, and from one of sgd, which
    has none."""
    final_tensors = []
    for first in ("momentum", "sgd"):
        # At this rate no weight moves: both checkpoints have the same weights.
        first_run = train(1, "--optimizer", first, "--lr", "1e-30", "--max-steps", "3", "--dtype", "float64")
        options = ("--optimizer", "rmsprop", "--lr", "0.01", "--max-steps", "6", "--dtype", "float64")
        resumed = train(1, *options, "--resume", first_run.checkpoint)
        assert f"the checkpoint is of {first}, not of rmsprop: the optimizer starts afresh" in resumed.stdout
        final_tensors.append(resumed.tensors())
    assert all(np.array_equal(tensor, final_tensors[1][name]) for name, tensor in final_tensors[0].items())
