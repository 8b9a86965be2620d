"""Scripts of jobs: their requests, their shell syntax, and their trainings."""

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from helpers import cuda_host
from helpers.paths import FAKE, ROOT

from psmpi import train
from psmpi.errors import UserError
from psmpi.submit.__main__ import submit
from psmpi.submit.job import Job, seconds
from psmpi.submit.slurm import submitting

SCRIPTS = sorted((ROOT / "jobs").glob("*.sh"))
TRAINING = ("--", "--dataset", "digits", "--epochs", "2")


@pytest.fixture
def script(tmp_path, monkeypatch, capsys):
    """script(*words): the script that psmpi submit prints for these words."""
    monkeypatch.chdir(tmp_path)

    def print_script(*words):
        assert submit([*words, "--activate", "", "--mpi", "pmi2", "--dry-run", *TRAINING]) == 0
        return capsys.readouterr().out

    return print_script


@pytest.fixture
def fake_slurm(tmp_path, monkeypatch):
    """Stand-ins for sbatch and srun that write their words, one a line; sbatch fails if a file `refuse` exists."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "sbatch").write_text(
        '#!/bin/bash\nif [ -e refuse ]; then echo "sbatch: error: invalid partition" >&2; exit 1; fi\n'
        'printf "%s\\n" "$@" > told\necho "Submitted batch job 17"\n'
    )
    (folder / "srun").write_text('#!/bin/bash\nprintf "%s\\n" "$@" >> "told-$SLURM_ARRAY_TASK_ID"\nexit "$STATUS"\n')
    (folder / "scontrol").write_text('#!/bin/bash\nprintf "%s\\n" "$@" > requeued\n')
    for file in folder.iterdir():
        file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_script(text, folder, status=0, task=0, **variables):
    environment = {
        **os.environ,
        "SLURM_JOB_ID": "17",
        "SLURM_ARRAY_TASK_ID": str(task),
        "STATUS": str(status),
        **variables,
    }
    (folder / "job").write_text(text)
    return subprocess.run(
        ["bash", "job", "--seed", "5"], cwd=folder, env=environment, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_the_scripts_of_the_project_are_as_their_commands_write_them(path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    text = path.read_text()
    command = re.search(r"Written by:\n# psmpi submit (.*)\n", text)[1]
    assert submit(shlex.split(command)) == 0
    assert capsys.readouterr().out == text


def test_there_is_a_script_for_each_kind_of_job():
    assert {path.stem for path in SCRIPTS} == {"one_node", "several_nodes", "gpus", "array", "long"}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck")
def test_shellcheck_finds_nothing(path):
    process = subprocess.run(["shellcheck", path], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[pytest.mark.slow] * (path.stem in ("several_nodes", "long")), id=path.stem)
        for path in SCRIPTS
    ],
)
def test_the_scripts_train(path, tmp_path):
    """One process takes the place of those that srun starts."""
    environment = {**os.environ, "SLURM_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "1", "PYTHONPATH": str(ROOT)}
    text = path.read_text()
    if "cupy" in text:
        if cuda_host.compiler() is None:
            pytest.skip("no g++ to compile the CUDA kernels as C++")
        environment["PYTHONPATH"] += f":{FAKE}"
    text = text.replace("srun --kill-on-bad-exit=0 --wait=30 python", sys.executable).replace(
        "source .venv", "true .venv"
    )
    (tmp_path / "job").write_text(text)
    process = subprocess.run(
        ["bash", "job", "--dataset", "digits", "--epochs", "1", "--max-steps", "3"], cwd=tmp_path, capture_output=True,
        text=True, env=environment, timeout=60, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert len(list((tmp_path / "runs").rglob("metrics.jsonl"))) == 1


def test_what_is_asked_for_stands_in_the_script(script):
    text = script(
        "--name", "many", "--ranks", "64", "--nodes", "8", "--cores", "4", "--gpus", "2", "--memory", "16G", "--time",
        "1-12", "--partition", "long", "--account", "me", "--modules", "openmpi/5", "--ask=--mail-type=END",
    )  # fmt: skip
    for line in (
        "--job-name=many", "--ntasks=64", "--nodes=8", "--cpus-per-task=4", "--gpus-per-node=2", "--mem=16G",
        "--time=1-12", "--partition=long", "--account=me", "--mail-type=END", "--signal=USR1@120",
        "--open-mode=append", "--requeue",
    ):  # fmt: skip
        assert f"\n#SBATCH {line}\n" in text, line
    assert "module load openmpi/5\n" in text and "--threads 4" in text and "scontrol requeue" not in text


def test_a_job_is_submitted(fake_slurm, capsys):
    assert submit(["--name", "mine", *TRAINING]) == 0
    assert (fake_slurm / "told").read_text() == "mine.sh\n"
    assert "mine.sh: Submitted batch job 17; it trains in runs/mine" in capsys.readouterr().out
    # submit writes its own script anew, and no other file.
    assert submit(["--name", "mine", "--ranks", "3", *TRAINING]) == 0
    assert "--ntasks=3" in (fake_slurm / "mine.sh").read_text()
    (fake_slurm / "mine.sh").write_text("precious")
    with pytest.raises(UserError, match=r"mine\.sh is a file that psmpi has not written"):
        submit(["--name", "mine", *TRAINING])


def test_where_no_script_can_be_written_the_error_says_so(fake_slurm):
    (fake_slurm / "file").touch()
    for path in (".", "file/job.sh"):
        with pytest.raises(UserError, match=rf"--script {re.escape(path)}: .*: name a file that can be written"):
            submit(["--script", path, *TRAINING])
    assert not (fake_slurm / "told").exists()


def test_an_environment_that_is_not_there_is_named(fake_slurm):
    with pytest.raises(UserError, match="--activate none/activate: no such file"):
        submit(["--activate", "none/activate", *TRAINING])


def test_that_a_job_goes_on_with_a_run_is_told(fake_slurm, capsys):
    assert train.main(["--dataset", "digits", "--epochs", "1", "--out", "runs/mine/seed=1"]) == 0
    for words, says in ((("--seeds", "2"), "goes on with the run"), ((), "trains"), (("--seeds", "1"), "trains")):
        assert submit(["--name", "mine", *words, *TRAINING]) == 0
        assert f"it {says} in runs/mine\n" in capsys.readouterr().out


def test_the_script_holds_whatever_the_shell_has_set(monkeypatch):
    """Variables of sbatch override the directives of a script, and those of an enclosing job reach srun."""
    text = "#!/bin/bash\n#SBATCH --time=01:00:00\n#SBATCH --array=0-3\n#SBATCH --requeue\n"
    shell = {"PATH": "/bin", "SBATCH_ACCOUNT": "me", "SLURM_CONF": "/c", "SLURM_CPU_BIND": "none"}
    overriding = {"SBATCH_TIMELIMIT": "7", "SBATCH_ARRAY_INX": "9", "SBATCH_NO_REQUEUE": "1"}
    assert submitting({**shell, **overriding}, text) == shell
    enclosing_job = {"SLURM_JOB_ID": "1", "SLURM_RESTART_COUNT": "999", "SRUN_DEBUG": "3", "PMI_RANK": "0"}
    del shell["SLURM_CPU_BIND"]
    assert submitting({**shell, **enclosing_job, "SLURM_CPU_BIND": "none"}, text) == shell


def test_scripts_of_environments_may_use_variables_that_are_not_set(script, fake_slurm, capsys):
    (fake_slurm / "activate").write_text('export FOUND="$NOWHERE_SET.it"\n')
    assert submit(["--activate", "activate", "--dry-run", *TRAINING]) == 0
    text = capsys.readouterr().out.replace("\nsrun", '\necho "$FOUND"\nsrun')
    assert run_script(text, fake_slurm).stdout == ".it\n"


def test_a_python_of_no_environment_is_named_by_its_path(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    assert submit(["--dry-run", *TRAINING]) == 0
    assert f" {sys.executable} -m psmpi.train" in capsys.readouterr().out


def test_options_on_the_wrong_side_are_told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for words, says in (
        (("--dataset", "digits"), "--dataset is an option of training: write it after --"),
        (("--", "--ranks", "3"), "--ranks is an option of the job: write it before --"),
    ):
        with pytest.raises(SystemExit):
            submit(words)
        assert says in capsys.readouterr().err


def test_a_value_of_sbatch_may_have_spaces(script):
    text = script("--ask=--comment=two words")
    assert "#SBATCH --comment='two words'\n" in text


def test_what_sbatch_says_is_passed_on(fake_slurm):
    (fake_slurm / "refuse").touch()
    with pytest.raises(UserError, match=r"sbatch does not take psmpi\.sh: sbatch: error: invalid partition"):
        submit([*TRAINING])


def test_without_sbatch_the_error_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="sbatch cannot be started"):
        submit([*TRAINING])


@pytest.mark.parametrize(
    ("status", "starts", "again"), [(85, 0, True), (85, 1000, False), (0, 0, False), (1, 0, False)]
)
def test_a_run_that_was_saved_is_requeued(script, fake_slurm, status, starts, again):
    process = run_script(script("--requeue"), fake_slurm, status, SLURM_RESTART_COUNT=str(starts))
    assert process.returncode == status
    requeued = fake_slurm / "requeued"
    assert requeued.exists() == again
    if again:
        assert requeued.read_text().split() == ["requeue", "17"]


def test_one_job_of_an_array_is_requeued_alone(script, fake_slurm):
    """The last job has the number of the array, and by that number SLURM would restart all jobs, done ones too."""
    process = run_script(script("--requeue", "--seeds", "3"), fake_slurm, 85, task=2, SLURM_ARRAY_JOB_ID="17")
    assert process.returncode == 85
    assert (fake_slurm / "requeued").read_text().split() == ["requeue", "17_2"]


def test_a_job_of_another_number_has_the_same_run_directory(script):
    text = script("--name", "mine")
    assert "--out runs/mine --resume auto" in text and "SLURM_JOB_ID" not in text


def test_jobs_of_an_array_have_their_own_options_and_run_directories(script, fake_slurm):
    (fake_slurm / "grid.toml").write_text(
        "model = ['mlp']\nlr = [0.1, 1e-3]\nwidths = [[8, 4]]\nshuffle = [true, false]\n"
    )
    text = script("--grid", "grid.toml")
    assert "#SBATCH --array=0-3\n" in text
    cases = [(rate, shuffle) for rate in ("0.1", "0.001") for shuffle in (True, False)]
    for task, (rate, shuffle) in enumerate(cases):
        assert run_script(text, fake_slurm, task=task).returncode == 0
        srun_words = (fake_slurm / f"told-{task}").read_text().splitlines()
        assert (
            srun_words[srun_words.index("--out") + 1] == f"runs/psmpi/model=mlp,lr={rate},widths=8-4,shuffle={shuffle}"
        )
        task_options = [
            "--model",
            "mlp",
            "--lr",
            rate,
            "--widths",
            "8",
            "4",
            "--shuffle" if shuffle else "--no-shuffle",
        ]
        assert srun_words[srun_words.index("auto") + 1 :] == [*task_options, "--seed", "5"]


@pytest.mark.parametrize(
    ("text", "seconds_"),
    [("30", 1800), ("2:30", 150), ("01:00:00", 3600), ("1-12", 129600), ("2-0:30", 174600), ("1-0:0:5", 86405)],
)
def test_time_limits_are_those_of_slurm(text, seconds_):
    assert seconds(text) == seconds_


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--time", "soon"), "--time 'soon': write minutes, HH:MM:SS"),
        (("--time", "3"), "--time 3 is 180 s, of which the last 120 are for saving"),
        (("--ranks", "2", "--nodes", "3"), "leaves nodes without a rank"),
        (("--ranks", "0"), "--ranks 0: expected a whole number from 1 up"),
        (("--name", "a b"), "--name 'a b': use letters"),
        (("--name", "../x"), "use letters"),
        (("--requeue", "--save-before", "0"), "set --save-before"),
        (("--seeds", "2", "--grid", "grid.toml"), "are one array"),
        (("--grid", "none.toml"), "--grid none.toml: No such file"),
        (("--grid", "grid.toml"), r"lr = 0.1: write a list of values: lr = \[...\]"),
        (("--ask", "a\nb"), "of one line each"),
        (("--script", "a\ntouch b"), "of one line each"),
        (("--ask", "mail-type=END"), "is no option of the batch system"),
        (("--partition", "a b"), "--partition 'a b': write it without spaces"),
        (("--grid", "twice.toml"), r"would share the run directory dataset=x\.npz"),
        (("--grid", "epochs.toml"), "--grid sets --epochs of each job"),
        (("--grid", "table.toml"), r"\[optimization\]: settings stand in no table here"),
        (("--grid", "own.toml"), "--out is the job's own"),
    ],
)
def test_what_makes_no_job_is_named(tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "grid.toml").write_text("lr = 0.1\n")
    (tmp_path / "twice.toml").write_text('dataset = ["a/x.npz", "b/x.npz"]\n')
    (tmp_path / "epochs.toml").write_text("epochs = [1, 2]\n")
    (tmp_path / "table.toml").write_text("[optimization]\nlr = [0.1]\n")
    (tmp_path / "own.toml").write_text('out = ["a", "b"]\n')
    with pytest.raises(UserError, match=says):
        submit([*words, "--dry-run", *TRAINING])


def test_values_of_a_grid_are_words(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "grid.toml").write_text('dataset = ["my data.npz", "$(rm x)"]\n')
    with pytest.raises(UserError, match="values are words without spaces and quotes"):
        Job(grid="grid.toml").tasks()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--out", "x"), "--out is the job's own: --name"),
        (("--resume", "auto"), "--resume is the job's own"),
        (("--threads", "2"), "--threads is the job's own: --cores"),
        (("--momentum", "0.5"), "momentum"),
        (("--local-steps", "20"), "--local-steps is of --method"),
        (("--dataset", "digitz"), "did you mean digits"),
        (("--save-signal", "USR2"), "--save-signal USR2: a job is warned by USR1"),
        (("--config", "other.toml"), "--save-signal XCPU: a job is warned by USR1"),
        (("--data-dir", "a\ntouch b\n#"), "of one line each"),
    ],
)
def test_training_that_could_not_start_is_not_submitted(tmp_path, monkeypatch, options, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.toml").write_text('[run]\nsave_signal = "XCPU"\n')
    with pytest.raises(UserError, match=says):
        submit(["--dry-run", "--", *options])


def test_gpus_that_training_would_not_use_are_not_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--gpus 2, and --backend numpy uses none"):
        submit(["--gpus", "2", "--dry-run", *TRAINING, "--backend", "numpy"])


def test_unknown_options_of_training_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        submit(["--dry-run", "--", "--epoch", "3"])
    assert "did you mean --epochs" in capsys.readouterr().err
