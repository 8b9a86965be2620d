"""The command line: help, configuration, error messages, and ranks that fail."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.paths import ROOT
from helpers.processes import finish, launch, start, without_note
from helpers.runs import run

from psmpi.comm.world import check_launcher, check_protocol, describe, lacking_memory
from psmpi.config import Config, from_toml, read_file, to_toml
from psmpi.errors import UserError
from psmpi.launcher import announced_size
from psmpi.registry import BUILTIN

TRAIN = ("-m", "psmpi.train")
OPTIONS = (
    "config method dataset data-dir model loss partition placement masters colocate replicas optimizer "
    "lr batch-size epochs max-steps seed dtype backend out resume checkpoint-every"
)


def test_importing_the_package_starts_no_mpi():
    modules = "psmpi, psmpi.layout, psmpi.training.loop, psmpi.methods.psl.method, psmpi.train, sys"
    code = f"import {modules}; print('mpi4py' in sys.modules)"
    status, out, err = launch(1, "-W", "error", "-c", code)
    assert (status, out.strip()) == (0, "False"), err


def test_only_the_world_module_names_comm_world():
    sources = [p for p in (ROOT / "psmpi").rglob("*.py") if ".COMM_WORLD" in p.read_text()]
    assert [p.name for p in sources] == ["world.py"]


def test_only_comm_speaks_to_mpi():
    """Only psmpi.comm, and psmpi.testing, whose communicator replaces MPI's, import mpi4py or call methods of a
    communicator."""
    for path in (ROOT / "psmpi").rglob("*.py"):
        if not {"comm", "testing"} & set(path.parts):
            text = path.read_text()
            assert not re.search(r"(from|import) mpi4py", text), path
            assert not re.search(r"world\.[A-Z]\w+\(", text), path


def test_modules_import_from_floors_below_only():
    """`floors` lists the layers of the package from the lowest up; a module imports from lower layers and its own
    folder only."""
    floors = [("errors", "metrics", "launcher"), ("output", "files"), ("registry",), ("backend",), ("layout",),
              ("nn", "optim", "data", "track"), ("config",), ("comm",), ("checkpoint",), ("training",), ("methods",),
              ("cost",), ("command",), ("train", "plan", "bench", "inspect", "predict", "plot", "doctor"),
              ("arrays",), ("submit", "sklearn", "torch"),
              ("__main__", "testing")]  # fmt: skip
    floor = {name: k for k, names in enumerate(floors) for name in names}
    root = ROOT / "psmpi"
    for path in root.rglob("*.py"):
        own = path.relative_to(root).parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        for name in re.findall(r"^\s*(?:from|import) psmpi\.(\w+)", path.read_text(), re.M):
            assert floor[name] < floor[own] or name == own, f"{path.name} imports psmpi.{name}"


def test_methods_do_not_import_each_other():
    root = ROOT / "psmpi" / "methods"
    for path in root.rglob("*.py"):
        own = path.relative_to(root).parts[0].removesuffix(".py")
        for name in re.findall(r"^\s*(?:from|import) psmpi\.methods\.(\w+)", path.read_text(), re.M):
            assert name == own, f"{path.name} imports psmpi.methods.{name}"


# Files of losses: psl is the name of a loss too.
LOSS_NAMES = (("config", "sections.py"), ("gpu", "losses.py"), ("compiled", "losses.py"))
# Patterns for methods whose names are also other words.
WORDS = {"next": r"""["']next["']|method next""", "tensor": r"""method(?: |["' =]+)tensor\b"""}


def test_only_a_method_and_the_registry_and_benchmarks_name_it():
    """No file outside a method's module names it. psl is also the name of a loss, and files of losses may name it."""
    root = ROOT / "psmpi"
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        allowed = {"psl"} if parts[-2:] in LOSS_NAMES else set()
        if parts[0] in ("registry.py", "bench") or parts[:2] == ("nn", "losses"):
            continue
        for name in BUILTIN.keys() - allowed:
            if parts[0] != "methods" or parts[1].removesuffix(".py") != name:
                pattern = WORDS.get(name, rf"\b{name}\b")
                match = re.search(pattern, path.read_text())
                assert not match, f"{path.relative_to(root)} names the method {name}"


def test_no_file_is_longer_than_a_few_screens():
    lengths = {path.name: len(path.read_text().splitlines()) for path in (ROOT / "psmpi").rglob("*.py")}
    assert {name: n for name, n in lengths.items() if n > 400} == {}


def test_help_names_every_option_with_its_default():
    status, out, err = run(1, *TRAIN, "--help-all")
    assert status == 0 and not err
    for option in OPTIONS.split():
        assert f"--{option}" in out, option
    assert "(default: psnet)" in " ".join(out.split())


def test_help_and_usage_errors_appear_once_under_mpirun():
    status, out, _ = launch(3, *TRAIN, "--help")
    assert status == 0 and out.count("--batch-size N ") == 1
    status, out, err = launch(3, *TRAIN, "--loss", "huber")
    assert status == 1 and (out + err).count("huber") == 1


def test_the_command_line_goes_before_the_file(train, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('[run]\nepochs = 1\nseed = 7\n[optimization]\nlr = 0.5\noptimizer = "sgd"\n')
    result = train(1, "--config", path, "--lr", "0.25")
    resolved = read_file(str(result.out / "config.toml"))
    assert (resolved.run.seed, resolved.run.epochs) == (7, 1)
    assert (resolved.optimization.lr, resolved.optimization.optimizer) == (0.25, "sgd")
    assert from_toml(to_toml(resolved), "again") == resolved


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[runs]\nepochs = 1", "unknown table \\[runs\\]"),
        ("[run]\nepoch = 1", "unknown setting 'epoch' in \\[run\\]; did you mean epochs\\?"),
        ("[runs]\nepochs = 1", "did you mean \\[run\\]\\?"),
        ("[optimisation]\nlr = 1", "did you mean \\[optimization\\]\\?"),
        ("[optimization]\nlearning_rate = 1", "'learning_rate' in \\[optimization\\]; did you mean lr\\?"),
        ("[run]\nlearning_rate = 1", "in \\[run\\]; did you mean lr, of \\[optimization\\]\\?"),
        ("[data]\nlr = 1", "unknown setting 'lr' in \\[data\\]: it is of \\[optimization\\]"),
        ("[data]\npartition = 'pairs'", "it is of \\[psl\\]"),
        ("epochs = 3", "epochs is a setting of \\[run\\]: write it below a line \\[run\\]"),
        ("epoch = 3", "did you mean epochs, of \\[run\\]\\?"),
        ("[[layers]]\ntype = 'dense'", "write \\[\\[model.layers\\]\\] for each"),
        ("[run]\nxyzzy = 1", "known are checkpoint_every, "),
        ('[run]\nepochs = "one"', "expected int, got str"),
        ('[objective]\nloss = "huber"', "choose one of psl, logistic, nll, squared"),
        ("[model]\nwidths = 3", "expected a list"),
        ("[run\nepochs = 1", "not valid TOML"),
    ],
)
def test_a_wrong_configuration_file_names_what_is_wrong(tmp_path, text, says):
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=says):
        read_file(str(path))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_configuration_file_may_begin_with_a_byte_order_mark(tmp_path, encoding):
    path = tmp_path / "run.toml"
    path.write_text('[run]\nseed = 7\nout = "läufe"\n', encoding)
    assert (read_file(str(path)).run.seed, read_file(str(path)).run.out) == (7, "läufe")


@pytest.mark.parametrize(
    ("encoding", "says"),
    [
        ("utf-16", "is UTF-16 text, and TOML is UTF-8"),
        ("utf-16-be", "is UTF-16 text, and TOML is UTF-8"),
        ("utf-32", "is UTF-32 text, and TOML is UTF-8"),
        ("utf-32-le", "is UTF-32 text, and TOML is UTF-8"),
        ("latin-1", "line 3: the byte 0xe4 is not UTF-8"),
    ],
)
def test_a_configuration_file_of_another_encoding_is_named(tmp_path, encoding, says):
    path = tmp_path / "run.toml"
    path.write_text('[run]\nseed = 7\nout = "läufe"\n', encoding)
    with pytest.raises(UserError, match=says):
        read_file(str(path))


def test_a_missing_configuration_file_is_named():
    with pytest.raises(UserError, match=r"none\.toml"):
        read_file("none.toml")


def test_the_default_configuration_survives_toml():
    assert from_toml(to_toml(Config()), "text") == Config()


@pytest.mark.parametrize(
    ("ranks", "options", "says"),
    [
        (1, ("--epochs", "0"), "--epochs 0"),
        (1, ("--lr", "0"), "--lr 0"),
        (1, ("--dataset", "minst"), "minst"),
        (1, ("--dataset", "mnist", "--data-dir", "nowhere"), "nowhere"),
        (1, ("--dataset", "mine.npz"), "mine.npz"),
        (1, ("--batch-size", "5000"), "5000"),
        (1, ("--schedule", "step"), "--step-size"),
        (1, ("--resume", "auto", "--out", ""), "--out"),
        (3, ("--dataset", "mnist", "--data-dir", "nowhere"), "nowhere"),
        (3, ("--model", "lenet"), "not made for samples of shape (1, 8, 8)"),
        (3, ("--model", "mlp"), "layer dense2 ties the classes"),
        (3, ("--masters", "3"), "leaves no worker"),
        (3, ("--masters", "4"), "start at least 4 ranks"),
        (3, ("--partition", "pairs", "--loss", "nll"), "--loss psl or --loss logistic"),
        (3, ("--replicas", "2", "--batch-size", "1"), "--batch-size 2 or more"),
        (3, ("--kappa", "-1"), "--kappa -1"),
        (3, ("--exp-clip", "200"), "from 0 to 88.7"),
        (3, ("--init-gain", "0"), "--init-gain"),
        (1, ("--init-gain", "inf"), "expected a finite number"),
        (1, ("--lr", "nan"), "expected a finite number"),
        (1, ("--kappa", "1e300"), "up to 1e6"),
        (1, ("--optimizer", "lbfgs", "--history", "100000000"), "1000 pairs at most"),
        (1, ("--sigma", "3"), "--sigma is of --optimizer plbfgs, plsr1 and plse, and the optimizer here is adam"),
        (
            3,
            ("--optimizer", "muon", "--masters", "3", "--colocate"),
            "a matrix that one rank has to step as a whole",
        ),
        (1, ("--merge-pairs",), "--merge-pairs is of --optimizer plbfgs"),
        (1, ("--step-size", "3"), "--step-size is of --schedule step"),
        (1, ("--clip", "0.5", "--optimizer", "lbfgs"), "--clip 0.5 is not for --optimizer lbfgs"),
        (1, ("--widths", "3"), "--model mlp"),
        (1, ("--checkpoint-gzip", "10"), "0 (none) to 9"),
        (1, ("--out", "/proc/none/run"), "name a folder that can be made"),
        (3, ("--out", "file"), "name a folder that can be made"),
    ],
)
def test_a_wrong_setting_is_one_message_that_names_the_fix(tmp_path, ranks, options, says):
    start_time = time.monotonic()
    (tmp_path / "file").write_text("")
    out = () if "--out" in options else ("--out", tmp_path / "run")
    status, stdout, stderr = run(ranks, *TRAIN, *out, *options, cwd=tmp_path)
    message = " ".join(stderr.split())
    assert status == 1, stdout
    assert says in message and "Traceback" not in message, message
    assert message.count("error:") == 1, message
    assert time.monotonic() - start_time < 20


def test_a_missing_module_is_named_with_the_python_that_lacks_it():
    code = "import sys; sys.modules['{0}'] = None; from psmpi.command import main; sys.exit(main({1!r}))"
    for module, arguments in (("tyro", ["train"]), ("numpy", ["predict", "x"]), ("h5py", ["inspect", "list", "x"])):
        status, _, err = launch(1, "-c", code.format(module, arguments))
        assert status == 1 and f"{sys.executable} has no module {module}" in err and "Traceback" not in err, err


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("train", ("--dataset", "mnist", "--data-dir")),
        ("train", ("--out",)),
        ("train", ("--resume",)),
        ("train", ("--config",)),
        ("predict", ()),
        ("inspect", ("show",)),
        ("inspect", ("list",)),
        ("plot", ("--out", "x.png")),
    ],
)
def test_places_that_cannot_be_looked_into_are_named(tmp_path, module, words):
    """A name that is too long stands in for any path that the system refuses, such as another user's folder."""
    place = "x" * 300
    status, _, err = run(1, "-m", f"psmpi.{module}", *words, place, cwd=tmp_path)
    assert status == 1 and place in err and "File name too long" in err and "Traceback" not in err, err


@pytest.mark.parametrize(
    "refused", [PermissionError(13, "Permission denied", "/root/x"), OSError(30, "Read-only", "/x")]
)
def test_what_a_system_refuses_is_no_error_of_the_program(refused):
    assert describe(refused).startswith(f"error: {refused.filename}: {refused.strerror}: name another place")
    assert "OSError" in describe(OSError("of our own"))


FAILING = """
import sys, time
from psmpi.comm.world import run, start
def program():
    world = start()
    if world.rank == 1:
        time.sleep(0.5)
        {failure}
    import numpy as np
    world.Allreduce(np.ones(3), np.ones(3))
    world.Barrier()
    return 0
sys.exit(run(program))
"""


@pytest.mark.parametrize(
    ("failure", "says"),
    [
        ("raise RuntimeError('the moon is full')", "RuntimeError: the moon is full"),
        ("from psmpi.errors import UserError; raise UserError('say cheese')", "error: say cheese"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", ""),
        ("sys.exit(5)", ""),
    ],
)
def test_a_rank_that_fails_ends_the_job(failure, says):
    start_time = time.monotonic()
    status, _, err = launch(3, "-c", FAILING.format(failure=failure), timeout=30)
    assert status != 0 and time.monotonic() - start_time < 12
    assert says in err
    if says:
        assert "rank 1 of 3" in err


@pytest.mark.parametrize("victim", [0, 2])
def test_a_rank_killed_in_training_ends_the_job(tmp_path, victim):
    process = start(4, *TRAIN, "--out", tmp_path / "run", "--epochs", "100000", cwd=tmp_path)
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("run/checkpoints/step-*.h5")):
            assert time.monotonic() < deadline, "training did not begin"
            time.sleep(0.1)
        ranks = [p for p in children(process.pid) if b"psmpi.train" in command(p) and b"mpirun" not in command(p)]
        ranks.sort()
        os.kill(ranks[victim], signal.SIGKILL)
        start_time = time.monotonic()
        status, _, _ = finish(process, 20)
        assert status != 0 and time.monotonic() - start_time < 10
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def command(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def children(pid):
    """Return the ids of all descendants of a process."""
    descendants = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        # A thread may have ended since.
        with contextlib.suppress(OSError):
            for child in task.read_text().split():
                descendants += [int(child), *children(int(child))]
    return descendants


def test_a_launcher_of_another_mpi_is_explained():
    assert announced_size({"PMI_SIZE": "4"}) == ("PMI_SIZE", 4)
    assert announced_size({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3"}) == ("SLURM_STEP_NUM_TASKS", 8)
    assert announced_size({"SLURM_NTASKS": "8"}) is None, "the batch shell itself"
    check_launcher(4, {"PMI_SIZE": "4"}, "MPICH")
    check_launcher(1, {}, "MPICH")
    with pytest.raises(UserError, match="started 4 processes \\(OMPI_COMM_WORLD_SIZE=4\\)"):
        check_launcher(1, {"OMPI_COMM_WORLD_SIZE": "4"}, "MPICH Version: 5")


@pytest.mark.parametrize(
    ("vendor", "environ", "pmix", "says"),
    [
        ("MPICH", {"OMPI_COMM_WORLD_SIZE": "1", "PMIX_NAMESPACE": "p"}, False, "the launcher is Open MPI's"),
        ("MPICH", {"PMIX_NAMESPACE": "p", "SLURM_PROCID": "0"}, False, "the launcher is one that speaks PMIx"),
        # MPICH with PMIx, MPICH told to use PMI 1, MPICH's launcher in a job of Open MPI's.
        ("MPICH", {"PMIX_NAMESPACE": "p"}, True, ""),
        ("MPICH", {"PMIX_NAMESPACE": "p", "MPIR_CVAR_PMI_VERSION": "1"}, False, ""),
        ("MPICH", {"PMIX_NAMESPACE": "p", "PMI_FD": "9", "HYDI_CONTROL_FD": "7"}, False, ""),
        ("MPICH", {"PMI_FD": "9", "HYDI_CONTROL_FD": "7"}, False, ""),
        ("MPICH", {}, False, ""),
        ("Open MPI", {"PMI_FD": "9", "HYDI_CONTROL_FD": "7"}, False, "the launcher is MPICH's"),
        ("Open MPI", {"OMPI_COMM_WORLD_SIZE": "2", "PMIX_NAMESPACE": "p"}, False, ""),
        # SLURM's launcher, which some builds of Open MPI accept.
        ("Open MPI", {"PMI_FD": "9", "SLURM_PROCID": "0"}, False, ""),
        ("Intel MPI", {"PMIX_NAMESPACE": "p"}, False, ""),
    ],
)
def test_a_launcher_under_which_mpi_would_not_start_is_explained_before(vendor, environ, pmix, says):
    if says:
        with pytest.raises(UserError, match=f"{says}.*belongs to another MPI. Use the mpirun"):
            check_protocol(vendor, environ, vendor, pmix)
    else:
        check_protocol(vendor, environ, vendor, pmix)


def test_a_lack_of_shared_memory_is_told_before_mpi_starts(tmp_path):
    assert lacking_memory("MPICH", str(tmp_path), 1) == "" == lacking_memory("Open MPI", "/nowhere")
    assert "/nowhere, by which MPICH's ranks share memory, cannot be written" in lacking_memory("MPICH", "/nowhere")
    assert " kB left: should MPI not start" in lacking_memory("MPICH", str(tmp_path), 1 << 62)


def test_singletons_of_another_launcher_stop_with_that_explanation(tmp_path):
    # PALS announces a size, and check_protocol does not know it.
    environment = {**os.environ, "PALS_SIZE": "3"}
    completed = subprocess.run(
        [sys.executable, *TRAIN, "--out", str(tmp_path / "run")], env=environment, capture_output=True, text=True,
        timeout=60, cwd=tmp_path,
    )  # fmt: skip
    assert completed.returncode == 1 and "belongs to another MPI" in completed.stderr
    # Only the process that the launcher calls rank 0 prints the message.
    completed = subprocess.run(
        [sys.executable, *TRAIN], env={**environment, "PALS_RANKID": "2"}, capture_output=True, text=True,
        timeout=60, cwd=tmp_path,
    )  # fmt: skip
    assert completed.returncode == 1 and not without_note(completed.stderr)


def test_what_several_ranks_meet_is_told_once(tmp_path):
    """The damage of a compressed file shows when ranks read their samples."""
    rng = np.random.default_rng(0)
    path = tmp_path / "x.npz"
    np.savez_compressed(path, x=rng.integers(0, 256, (400, 8, 8)).astype(np.uint8), y=np.arange(400) % 10)
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 255
    path.write_bytes(data)
    status, _, err = launch(4, *TRAIN, "--out", tmp_path / "run", "--dataset", path)
    assert status == 1 and err.count("x.npz") == 1 and "Traceback" not in err, err


def test_samples_that_are_not_numbers_are_named(tmp_path):
    x = np.random.default_rng(0).random((100, 6))
    x[40, 3] = np.nan
    np.savez(tmp_path / "x.npz", x=x, y=np.arange(100) % 2)
    options = ("--dataset", tmp_path / "x.npz", "--loss", "nll", "--model", "mlp", "--batch-size", "10")
    status, _, err = run(1, *TRAIN, "--out", tmp_path / "run", *options)
    assert status == 1 and "sample 40 has values that are not finite" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("option", "meant"), [("--learning-rate", "--lr"), ("--batch_sizes", "--batch-size"), ("--no-shufle", "--shuffle")]
)
def test_an_unknown_option_is_told_with_the_one_that_may_be_meant(option, meant):
    status, _, err = run(2, *TRAIN, option, "3")
    assert status == 1 and f"{option} is no option; did you mean {meant}?" in err
    status, _, err = run(1, *TRAIN, "--lr", "x", "--batch_size", "3", "--no-shuffle")
    assert status == 1 and "is no option" not in err


@pytest.mark.filterwarnings("ignore:The field `model.layers`")
def test_a_layer_that_is_no_table_is_named(tmp_path):
    (tmp_path / "net.toml").write_text('[model]\nmodel = "custom"\nlayers = ["dense"]\n')
    status, _, err = run(1, *TRAIN, "--config", tmp_path / "net.toml", "--out", tmp_path / "run")
    assert status == 1 and "'dense' is not a table" in err and "Traceback" not in err


def test_more_threads_than_cores_are_told(train):
    """600 threads are more than any machine of the tests has cores."""
    assert "2 rank(s) of 600 thread(s)" in train(2, "--max-steps", "1", "--threads", "600").stdout
    assert "thread(s)" not in train(1, "--max-steps", "1", "--threads", "1").stdout


def test_odd_names_of_folders_are_no_markup(train, tmp_path):
    assert "mk[red]x" in train(1, "--epochs", "1", out=tmp_path / "mk[red]x").stdout


@pytest.mark.parametrize("suffix", ["npz", "h5"])
def test_own_data_trains(train, tmp_path, suffix):
    import h5py

    rng = np.random.default_rng(0)
    centres = rng.normal(size=(4, 12))
    y = np.arange(400) % 4
    x = (centres[y] + 0.3 * rng.normal(size=(400, 12))).astype(np.float32)
    path = tmp_path / f"mine.{suffix}"
    if suffix == "npz":
        np.savez(path, x=x, y=y)
    else:
        with h5py.File(path, "w") as file:
            file["x"], file["y"] = x, y
    config = tmp_path / "net.toml"
    config.write_text(
        '[model]\nmodel = "custom"\n[[model.layers]]\ntype = "dense"\nunits = 12\n[[model.layers]]\ntype = "tanh"\n'
        '[[model.layers]]\ntype = "separable_dense"\nunits = 4\ngroups = 4\n'
    )
    result = train(3, "--dataset", path, "--config", config, "--epochs", "30", "--lr", "0.01", "--batch-size", "20")
    assert result.rows[-1]["test_accuracy"] > 0.9


@pytest.mark.parametrize("options", [("--compression", "topk"), ("--local-steps", "5"), ("--feedback", "shared")])
def test_settings_of_another_method_are_not_passed_over(tmp_path, options):
    status, _, err = run(1, "-m", "psmpi.train", "--out", tmp_path / "run", *options)
    assert status == 1 and "and the method here is psl: leave it out, or choose " in err


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_wrong_layer_is_told_with_its_file(tmp_path, ranks):
    file = tmp_path / "net.toml"
    branch = '[[model.layers]]\ntype = "residual"\nlayers = [{type = "relu"}, {type = "dense", unit = 7}]\n'
    file.write_text(f'[model]\nmodel = "custom"\n[[model.layers]]\ntype = "flatten"\n{branch}')
    message = f"{file}: [[model.layers]] entry 2, entry 2 of its layers (dense1): a dense layer needs 'units'"
    for module in ("psmpi.train", "psmpi.bench")[: 3 - ranks]:
        command = ("memory",) if module == "psmpi.bench" else ("--out", tmp_path / "run")
        status, _, err = run(ranks, "-m", module, *command, "--config", file)
        assert status == 1 and message in err, err


UNUSED = [
    (("--momentum", "0.9"), "--momentum is of --optimizer momentum"),
    (("--sigma=0.0",), "--sigma is of --optimizer plbfgs, plsr1 and plse"),
    (("--no-merge-pairs",), "--no-merge-pairs is of --optimizer"),
    (("--gamma", "0.1"), "--gamma is of --schedule step"),
    (("--optimizer", "lbfgs", "--clip", "1"), "--clip 1.0 is not for --optimizer lbfgs"),
    (("--local-steps", "20"), "--local-steps is of --method local_sgd, ist and next, and the method here is psl"),
    (("--local_steps", "20"), "--local-steps is of --method local_sgd, ist and next, and the method here is psl"),
    (("--method", "data_parallel", "--no-colocate"), "--no-colocate is of --method psl and ist"),
    (("--loss", "nll", "--kappa", "1"), "--kappa is of --loss psl, logistic and hinge, and the loss here is nll"),
    (("--loss", "logistic", "--exp-clip", "3"), "--exp-clip is of --loss psl, and the loss here is logistic"),
]


@pytest.mark.parametrize(("options", "says"), UNUSED)
def test_words_that_nothing_uses_are_refused_even_with_the_default_value(tmp_path, options, says):
    status, _, err = run(1, "-m", "psmpi.train", "--out", tmp_path / "run", *options)
    assert status == 1 and says in err and "leave it out" in err and not (tmp_path / "run").exists()


def test_files_and_runs_that_go_on_may_list_what_nothing_uses(train, tmp_path):
    file = tmp_path / "all.toml"
    file.write_text("[optimization]\nmomentum = 0.9\ngamma = 0.1\nsigma = 0.0\n[replicated]\nlocal_steps = 20\n")
    train(1, "--config", file, "--max-steps", "1")
    first_run = train(1, "--optimizer", "momentum", "--momentum", "0.9", "--kappa", "2", "--max-steps", "1")
    resume_options = ("--resume", "auto", "--max-steps", "2", "--optimizer", "adam", "--loss", "nll")
    train(1, *resume_options, out=first_run.out)
    status, _, err = run(1, "-m", "psmpi.train", "--out", first_run.out, *resume_options, "--momentum", "0.9")
    assert status == 1 and "--momentum is of --optimizer momentum" in err
    # --compression dgc uses --momentum, whatever the optimizer.
    train(2, "--method", "data_parallel", "--compression", "dgc", "--momentum", "0.9", "--max-steps", "1")


def test_measurements_refuse_what_nothing_uses():
    status, _, err = run(1, "-m", "psmpi.bench", "memory", "--momentum", "0.9")
    assert status == 1 and "--momentum is of --optimizer momentum" in err
