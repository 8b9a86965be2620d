"""The run directory: made once, locked, written whole, never through links, and made again after its removal."""

import errno
import fcntl
import json
import os
import shutil
import threading

import pytest

from psmpi.checkpoint import Lock
from psmpi.checkpoint.build import write_file
from psmpi.errors import UserError
from psmpi.training.folder import RunFolder

ROWS = [{"epoch": 1}, {"epoch": 2}]


@pytest.fixture
def messages():
    return []


def begun(out, messages, rows=(), **options):
    folder = RunFolder(out, messages.append, **options)
    folder.begin("a = 1\n", rows, -1, damaged=False)
    return folder


def texts(out):
    return {path.name: path.read_text() for path in out.iterdir() if path.is_file()}


def test_two_runs_do_not_share_a_folder(tmp_path, messages):
    with begun(tmp_path / "run", messages):
        with pytest.raises(UserError, match="another run is writing there"):
            RunFolder(tmp_path / "run", messages.append, patience=0.3)
        assert messages == [f"waiting for another run to leave {tmp_path / 'run'}"]
    RunFolder(tmp_path / "run", messages.append).close()


def test_removing_files_does_not_give_the_lock_away(tmp_path, messages):
    with begun(tmp_path / "run", messages):
        for path in (tmp_path / "run").iterdir():
            path.unlink()
        with pytest.raises(UserError, match="another run is writing there"):
            RunFolder(tmp_path / "run", messages.append, patience=0)


def test_where_directories_have_no_locks_a_file_has_it(tmp_path, monkeypatch):
    real = fcntl.flock

    def no_directories(fd, how):
        if os.path.isdir(f"/proc/self/fd/{fd}"):
            raise OSError(errno.EBADF, "not for directories")
        real(fd, how)

    monkeypatch.setattr(fcntl, "flock", no_directories)
    lock = Lock(tmp_path)
    with pytest.raises(BlockingIOError):
        Lock(tmp_path)
    assert lock.there
    (tmp_path / ".lock").unlink()
    assert not lock.there
    lock.close()
    Lock(tmp_path).close()


def test_where_there_are_no_locks_at_all_a_run_goes_on(tmp_path, monkeypatch):
    def no_locks(fd, how):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    first, second = Lock(tmp_path), Lock(tmp_path)
    assert first.there and second.there


def test_unnamed_folders_of_one_second_are_apart(tmp_path, messages, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda form: "now")
    folders, start = [], threading.Barrier(8)

    def make():
        start.wait()
        folders.append(RunFolder.unnamed("digits-mlp", messages.append))

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {str(folder.path) for folder in folders} == {
        "runs/now-digits-mlp",
        *(f"runs/now-digits-mlp-{k}" for k in range(2, 9)),
    }
    for folder in folders:
        folder.close()
    # Nothing was begun in them.
    assert not (tmp_path / "runs").exists() or list((tmp_path / "runs").iterdir()) == []


def test_a_start_that_is_refused_leaves_no_folder_of_its_own_and_no_trace(tmp_path, messages):
    with pytest.raises(KeyError), RunFolder(tmp_path / "new", messages.append):
        raise KeyError
    assert not (tmp_path / "new").exists()
    begun(tmp_path / "old", messages, ROWS).close()
    before = texts(tmp_path / "old")
    with pytest.raises(KeyError), RunFolder(tmp_path / "old", messages.append):
        raise KeyError
    assert texts(tmp_path / "old") == before and before["metrics.jsonl"].count("\n") == 2


@pytest.mark.parametrize("name", ["config.toml", "metrics.jsonl", "checkpoints"])
def test_links_are_not_written_through(tmp_path, messages, name):
    out, private = tmp_path / "run", tmp_path / "private"
    out.mkdir()
    private.mkdir()
    (out / name).symlink_to(private if name == "checkpoints" else private / "file")
    with pytest.raises(UserError, match=f"{name} is a symbolic link"):
        RunFolder(out, messages.append)
    assert list(private.iterdir()) == [] and (out / name).is_symlink()
    RunFolder(tmp_path / "again", messages.append).close()


def test_a_link_made_later_is_replaced_and_not_followed(tmp_path, messages):
    # The private text is as long as the rows so far.
    private, private_text = tmp_path / "private", json.dumps(ROWS[0]).replace("1", "7") + "\n"
    private.write_text(private_text)
    with begun(tmp_path / "run", messages, ROWS[:1]) as folder:
        (folder.path / "metrics.jsonl").unlink()
        (folder.path / "metrics.jsonl").symlink_to(private)
        folder.append(ROWS[1])
    assert private.read_text() == private_text
    assert texts(folder.path)["metrics.jsonl"].splitlines() == [json.dumps(row) for row in ROWS]


def test_checkpoints_are_written_through_no_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "checkpoints").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic link"):
        write_file(tmp_path / "checkpoints" / "step-000000001.h5", None, {}, None)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_the_folder_itself_may_be_a_link(tmp_path, messages):
    (tmp_path / "room").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "room")
    begun(tmp_path / "run", messages, ROWS).close()
    assert "config.toml" in texts(tmp_path / "room")


def test_a_folder_that_is_removed_is_made_again_and_told(tmp_path, messages):
    with begun(tmp_path / "run", messages, ROWS[:1]) as folder:
        assert folder.keep() is None
        shutil.rmtree(folder.path)
        assert folder.keep() is folder.lock
        folder.append(ROWS[1])
        with pytest.raises(UserError, match="another run is writing there"):
            RunFolder(folder.path, messages.append, patience=0)
    assert ["removed or moved while this run writes to it" in line for line in messages] == [True]
    assert texts(folder.path)["config.toml"] == "a = 1\n"
    assert texts(folder.path)["metrics.jsonl"].splitlines() == [json.dumps(row) for row in ROWS]


def test_a_folder_that_is_emptied_gets_its_texts_again_and_that_is_told(tmp_path, messages):
    with begun(tmp_path / "run", messages, ROWS) as folder:
        for path in folder.path.iterdir():
            path.unlink()
        assert folder.keep() is None and folder.keep() is None
    assert ["were removed while this run writes to it" in line for line in messages] == [True]
    assert texts(folder.path)["config.toml"] == "a = 1\n"
    assert texts(folder.path)["metrics.jsonl"].splitlines() == [json.dumps(row) for row in ROWS]


def test_a_folder_that_another_run_has_now_is_left_to_it(tmp_path, messages):
    with begun(tmp_path / "run", messages) as folder:
        (tmp_path / "run").rename(tmp_path / "moved")
        with begun(tmp_path / "run", messages), pytest.raises(UserError, match="another run has written there since"):
            folder.keep()
        # The other run has ended, and left a checkpoint.
        (tmp_path / "run" / "checkpoints").mkdir()
        (tmp_path / "run" / "checkpoints" / "step-000000001.h5").write_bytes(b"")
        with pytest.raises(UserError, match="another run has written there since"):
            folder.keep()


def test_a_row_that_could_not_be_written_comes_with_the_next(tmp_path, messages, monkeypatch):
    with begun(tmp_path / "run", messages) as folder:
        with monkeypatch.context() as patch:
            patch.setattr(folder, "_replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
            (folder.path / "metrics.jsonl").unlink()
            with pytest.raises(OSError, match="full"):
                folder.append(ROWS[0])
        folder.append(ROWS[1])
    assert texts(folder.path)["metrics.jsonl"].splitlines() == [json.dumps(row) for row in ROWS]


def test_a_folder_that_cannot_be_made_is_named(tmp_path, messages):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="name a folder that can be made"):
        RunFolder(tmp_path / "file" / "run", messages.append)
