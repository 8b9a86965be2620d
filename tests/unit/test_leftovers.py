"""Leftovers of killed MPI jobs on a host are removed, unless a process still uses them."""

import mmap
import os
import socket
import subprocess
import sys

import pytest
from helpers.processes import launch, without_note

from psmpi.comm import leftovers
from psmpi.comm.leftovers import remove_leftovers

HERE, USER = socket.gethostname(), os.getuid()


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Folders in place of /dev/shm and /tmp; no file in them is too young to be removed."""
    monkeypatch.setattr(leftovers, "YOUNG", -1.0)
    memory, folder = tmp_path / "shm", tmp_path / "tmp"
    memory.mkdir()
    folder.mkdir()
    return memory, folder


def segments(memory, *names):
    for name in names:
        (memory / name).write_bytes(bytes(4096))


def session(folder, pid, host=HERE):
    path = folder / f"ompi.{pid}"
    (path / f"pmix.{host}.tool").mkdir(parents=True)
    (path / "1").mkdir()
    (path / "1" / "jobdata").write_bytes(bytes(4096))
    return path


@pytest.fixture
def dead():
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_segments_of_the_dead_go_and_others_stay(places):
    memory, folder = places
    left = ["mpich_shm_1007cfc0_0", "mpich_shm_121d_0", f"sm_segment.{HERE}.{USER}.35fa0000.0", "ucx_shm_posix_3f2a"]
    staying = [
        "mpich_shm_zz_0",
        "mpich_shm_12_0.txt",
        "sem.mpich_shm_1_0",
        f"sm_segment.elsewhere.{USER}.35fa0000.0",
        "a",
    ]
    segments(memory, *left, *staying, "mpich_shm_aa_0")
    (memory / "mpich_shm_bb_0").symlink_to(memory / "a")
    with open(memory / "mpich_shm_aa_0", "r+b") as file, mmap.mmap(file.fileno(), 4096):
        assert remove_leftovers(memory, folder) == (4, 4 * 4096)
        assert sorted(os.listdir(memory)) == sorted([*staying, "mpich_shm_aa_0", "mpich_shm_bb_0"])
    assert remove_leftovers(memory, folder) == (1, 4096)


def test_what_was_just_made_stays(places, monkeypatch):
    memory, folder = places
    monkeypatch.undo()
    segments(memory, "mpich_shm_1007cfc0_0")
    assert remove_leftovers(memory, folder) == (0, 0)


def test_another_user_s_stay(places, monkeypatch):
    memory, folder = places
    segments(memory, "mpich_shm_1007cfc0_0")
    monkeypatch.setattr(os, "getuid", lambda: USER + 1)
    assert remove_leftovers(memory, folder) == (0, 0)


def test_sessions_of_the_dead_go(places, dead):
    memory, folder = places
    living, ended, elsewhere = (
        session(folder, os.getpid()),
        session(folder, dead),
        session(folder, dead + 1, "elsewhere"),
    )
    (folder / "ompi.txt").write_text("mine")
    remove_leftovers(memory, folder)
    assert living.exists() and elsewhere.exists() and not ended.exists() and (folder / "ompi.txt").exists()


def test_ranks_that_outlive_their_launcher_keep_its_session(places, dead):
    memory, folder = places
    session_folder = session(folder, dead)
    with open(session_folder / "1" / "jobdata", "r+b") as file, mmap.mmap(file.fileno(), 4096):
        remove_leftovers(memory, folder)
        assert session_folder.exists()
    remove_leftovers(memory, folder)
    assert not session_folder.exists()


def test_sessions_of_single_processes_go_with_their_segments(places):
    """A process without segments may be alive, as with OMPI_MCA_btl=self."""
    memory, folder = places
    segments(memory, *(f"sm_segment.{HERE}.{USER}.{job}.0" for job in ("12410000", "12420000")))
    jobs_folder = folder / f"ompi.{HERE}.{USER}" / "jf.0"
    for job in (0x12410000, 0x12420000, 0x12430000):
        (jobs_folder / str(job) / "0").mkdir(parents=True)
    with open(memory / f"sm_segment.{HERE}.{USER}.12410000.0", "r+b") as file, mmap.mmap(file.fileno(), 4096):
        remove_leftovers(memory, folder)
    assert sorted(os.listdir(jobs_folder)) == [str(0x12410000), str(0x12430000)]


def test_a_segment_that_another_rank_has_made_anew_stays(places, monkeypatch):
    """Another rank removes the old segment and makes one of the same name after this rank has looked."""
    memory, folder = places
    segments(memory, "mpich_shm_10_0")
    look = leftovers._used

    def slowly():
        used = list(look())
        (memory / "mpich_shm_10_0").unlink()
        segments(memory, "mpich_shm_10_0")
        return used

    monkeypatch.setattr(leftovers, "_used", slowly)
    assert remove_leftovers(memory, folder) == (0, 0)
    assert (memory / "mpich_shm_10_0").exists()


def test_what_is_in_use_is_known_under_its_place_s_other_name(places):
    """/dev/shm may be a link to /run/shm."""
    memory, folder = places
    (folder / "link").symlink_to(memory)
    segments(memory, "mpich_shm_10_0")
    with open(memory / "mpich_shm_10_0", "r+b") as file, mmap.mmap(file.fileno(), 4096):
        assert remove_leftovers(folder / "link", folder) == (0, 0)
    assert remove_leftovers(folder / "link", folder) == (1, 4096)


def test_nothing_goes_where_processes_cannot_be_seen(places, dead, monkeypatch):
    memory, folder = places
    segments(memory, "mpich_shm_10_0")
    session_folder = session(folder, dead)
    monkeypatch.setattr(leftovers, "PROCESSES", str(folder / "none"))
    assert remove_leftovers(memory, folder) == (0, 0)
    assert session_folder.exists() and os.listdir(memory) == ["mpich_shm_10_0"]


def test_other_files_of_a_full_folder_are_not_looked_at(places, monkeypatch):
    memory, folder = places
    segments(memory, *(f"x{k}" for k in range(100)))
    monkeypatch.setattr(leftovers.os, "getuid", lambda: pytest.fail("looked at"))
    assert remove_leftovers(memory, folder) == (0, 0)


def test_no_such_folders(tmp_path):
    assert remove_leftovers(tmp_path / "no", tmp_path / "none") == (0, 0)


def test_a_start_tells_what_it_has_removed():
    code = "from psmpi.comm import world; world.remove_leftovers = lambda: (2, 4_000_000); world.start()"
    status, out, err = launch(1, "-c", code)
    assert (status, out) == (0, "") and "removed 2 segment(s) of shared memory, 4 MB" in err
    assert without_note(err) == ""
