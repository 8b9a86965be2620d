"""What killed MPI jobs leave on a host is removed, and what anybody still uses is not."""

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
    """/dev/shm and /tmp of a host where nothing is just made."""
    monkeypatch.setattr(leftovers, "YOUNG", -1.0)
    memory, folder = tmp_path / "shm", tmp_path / "tmp"
    memory.mkdir()
    folder.mkdir()
    return memory, folder


def segments(memory, *names):
    for name in names:
        (memory / name).write_bytes(bytes(4096))


def session(folder, pid, host=HERE):
    one = folder / f"ompi.{pid}"
    (one / f"pmix.{host}.tool").mkdir(parents=True)
    (one / "1").mkdir()
    (one / "1" / "jobdata").write_bytes(bytes(4096))
    return one


@pytest.fixture
def dead():
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_segments_of_the_dead_go_and_others_stay(places):
    memory, folder = places
    left = ["mpich_shm_1007cfc0_0", "mpich_shm_121d_0", f"sm_segment.{HERE}.{USER}.35fa0000.0", "ucx_shm_posix_3f2a"]
    kept = ["mpich_shm_zz_0", "mpich_shm_12_0.txt", "sem.mpich_shm_1_0", f"sm_segment.elsewhere.{USER}.35fa0000.0", "a"]
    segments(memory, *left, *kept, "mpich_shm_aa_0")
    (memory / "mpich_shm_bb_0").symlink_to(memory / "a")
    with open(memory / "mpich_shm_aa_0", "r+b") as file, mmap.mmap(file.fileno(), 4096):
        assert remove_leftovers(memory, folder) == (4, 4 * 4096)
        assert sorted(os.listdir(memory)) == sorted([*kept, "mpich_shm_aa_0", "mpich_shm_bb_0"])
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
    living, gone, other = session(folder, os.getpid()), session(folder, dead), session(folder, dead + 1, "elsewhere")
    (folder / "ompi.txt").write_text("mine")
    remove_leftovers(memory, folder)
    assert living.exists() and other.exists() and not gone.exists() and (folder / "ompi.txt").exists()


def test_ranks_that_outlive_their_launcher_keep_its_session(places, dead):
    memory, folder = places
    one = session(folder, dead)
    with open(one / "1" / "jobdata", "r+b") as file, mmap.mmap(file.fileno(), 4096):
        remove_leftovers(memory, folder)
        assert one.exists()
    remove_leftovers(memory, folder)
    assert not one.exists()


def test_sessions_of_single_processes_go_with_their_segments(places):
    """One that has none may live: without shared memory, as with OMPI_MCA_btl=self."""
    memory, folder = places
    segments(memory, *(f"sm_segment.{HERE}.{USER}.{job}.0" for job in ("12410000", "12420000")))
    of = folder / f"ompi.{HERE}.{USER}" / "jf.0"
    for job in (0x12410000, 0x12420000, 0x12430000):
        (of / str(job) / "0").mkdir(parents=True)
    with open(memory / f"sm_segment.{HERE}.{USER}.12410000.0", "r+b") as file, mmap.mmap(file.fileno(), 4096):
        remove_leftovers(memory, folder)
    assert sorted(os.listdir(of)) == [str(0x12410000), str(0x12430000)]


def test_a_segment_that_another_rank_has_made_anew_stays(places, monkeypatch):
    """It was ahead: removed that of the dead, and made its own of that name, after this rank had looked."""
    memory, folder = places
    segments(memory, "mpich_shm_10_0")
    look = leftovers._mapped_files

    def slowly():
        found = list(look())
        (memory / "mpich_shm_10_0").unlink()
        segments(memory, "mpich_shm_10_0")
        return found

    monkeypatch.setattr(leftovers, "_mapped_files", slowly)
    assert remove_leftovers(memory, folder) == (0, 0)
    assert (memory / "mpich_shm_10_0").exists()


def test_what_is_in_use_is_known_under_its_place_s_other_name(places):
    """As where /dev/shm is a link to /run/shm."""
    memory, folder = places
    (folder / "link").symlink_to(memory)
    segments(memory, "mpich_shm_10_0")
    with open(memory / "mpich_shm_10_0", "r+b") as file, mmap.mmap(file.fileno(), 4096):
        assert remove_leftovers(folder / "link", folder) == (0, 0)
    assert remove_leftovers(folder / "link", folder) == (1, 4096)


def test_nothing_goes_where_processes_cannot_be_seen(places, dead, monkeypatch):
    memory, folder = places
    segments(memory, "mpich_shm_10_0")
    one = session(folder, dead)
    monkeypatch.setattr(leftovers, "PROCESSES", str(folder / "none"))
    assert remove_leftovers(memory, folder) == (0, 0)
    assert one.exists() and os.listdir(memory) == ["mpich_shm_10_0"]


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
