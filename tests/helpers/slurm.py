"""A temporary SLURM cluster of one node on this host; needs root."""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
# Final states of a job.
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL")


def missing():
    """The reason why no SLURM can be started on this machine, or ""."""
    if os.getuid() != 0:
        return "a SLURM of its own needs root"
    absent = [name for name in (*DAEMONS, "sbatch", "srun", "scontrol") if program_path(name) is None]
    return f"no {', '.join(absent)}: install slurm-wlm and munge" if absent else ""


def program_path(name):
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/bin")


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


class Cluster:
    """A context manager that runs the daemons of SLURM and munge, with all their files in one folder."""

    def __init__(self):
        # Not pytest's folder: paths of sockets must be short, and munge must own every parent folder.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.folder.chmod(0o755)
        self.environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}
        self.processes = []

    def __enter__(self):
        folder, host = self.folder, socket.gethostname()
        for name in ("state", "spool", "munge"):
            (folder / name).mkdir(mode=0o755)
        key = folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
        settings = {
            "ClusterName": "psmpi", "SlurmctldHost": f"{host}(127.0.0.1)", "SlurmctldPort": free_port(),
            "SlurmdPort": free_port(), "SlurmUser": "root", "AuthType": "auth/munge",
            "AuthInfo": f"socket={folder}/munge/socket", "StateSaveLocation": folder / "state",
            "SlurmdSpoolDir": folder / "spool", "SlurmctldPidFile": folder / "ctld.pid",
            "SlurmdPidFile": folder / "slurmd.pid", "ProctrackType": "proctrack/linuxproc", "TaskPlugin": "task/none",
            "SelectType": "select/cons_tres", "SelectTypeParameters": "CR_Core", "ReturnToService": 2,
            "MpiDefault": "pmi2", "KillWait": 20,
            # MPICH names shared memory by the job: job numbers must differ from those of other clusters on this host.
            "FirstJobId": random.randrange(1000, 60_000_000),
        }  # fmt: skip
        node = f"NodeName={host} NodeAddr=127.0.0.1 CPUs={os.cpu_count()} RealMemory={int(memory * 0.8)}"
        partition = "PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:8"
        lines = [*(f"{name}={value}" for name, value in settings.items()), node, partition]
        (folder / "slurm.conf").write_text("\n".join(lines) + "\n")
        munge = folder / "munge"
        self._start(
            "munged", "-F", f"--key-file={key}", f"--socket={munge}/socket", f"--pid-file={munge}/pid",
            f"--log-file={munge}/log", f"--seed-file={munge}/seed", "--num-threads=2",
        )  # fmt: skip
        self._await(lambda: (munge / "socket").exists())
        self._start("slurmctld", "-D", "-i")
        self._await(lambda: self.run("scontrol", "ping").returncode == 0)
        self._start("slurmd", "-D", "-N", host)
        self._await(lambda: "idle" in self.run("sinfo", "-h", "-o", "%t").stdout)
        return self

    def __exit__(self, *error):
        with contextlib.suppress(Exception):
            self.run("scancel", "--signal=KILL", "--full", "--user=root")
            self.run("scancel", "--user=root")
            self._await(lambda: not self.run("squeue", "-h").stdout.strip(), 30)
        for process in reversed(self.processes):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, name, *arguments):
        command = [program_path(name), *arguments]
        with open(self.folder / f"{name}.log", "wb") as log:
            process = subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self.processes.append(process)

    def _await(self, done, patience=30):
        end = time.monotonic() + patience
        while not done():
            assert time.monotonic() < end, "\n".join(p.read_text()[-2000:] for p in self.folder.glob("*.log"))
            time.sleep(0.1)

    def run(self, *command, cwd=None, timeout=60, **environment):
        """Run a command of SLURM to its end; return the completed process."""
        return subprocess.run(
            [program_path(command[0]) or command[0], *map(str, command[1:])],
            env={**self.environment, **environment},
            cwd=cwd,
            text=True,
            capture_output=True,
            timeout=timeout,
            check=False,
        )

    def show(self, job, name):
        """The value of a field of a job, from `scontrol show job`."""
        text = self.run("scontrol", "show", "job", job, "-o").stdout
        return text.partition(f" {name}=")[2].split(" ")[0].split("\n")[0]

    def wait(self, job, patience, states=ENDED):
        """Wait until the state of a job is one of `states`, and return it."""
        end = time.monotonic() + patience
        while (state := self.show(job, "JobState")) not in states:
            assert time.monotonic() < end, f"job {job} is {state} after {patience} s"
            time.sleep(0.2)
        return state

    def again(self, job):
        """Start a requeued job at once; SLURM would wait two minutes."""
        self.wait(job, 60, ("PENDING",))
        # slurmd takes a job that starts in the second in which it was killed for the killed one.
        time.sleep(2)
        end = time.monotonic() + 60
        while self.show(job, "JobState") == "PENDING":
            assert time.monotonic() < end, self.run("scontrol", "show", "job", job).stdout
            self.run("scontrol", "update", f"JobId={job}", "StartTime=now")
            time.sleep(0.5)
