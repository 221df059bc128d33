"""Outputs are whole or absent, whoever else writes them, wherever that is, and however it ends."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.work import atomic, lock


def write(path: Path, data: bytes) -> None:
    with atomic.output(path) as file:
        file.write(data)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def in_child(code: str, *arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_interrupted_output_is_absent(tmp_path):
    for error in (KeyboardInterrupt, SystemExit, IntactKVError, ZeroDivisionError):
        with pytest.raises(error), atomic.output(tmp_path / "x") as file:
            file.write(b"half")
            raise error
        with pytest.raises(error), atomic.work_directory(tmp_path / "x") as directory:
            (directory / "y").write_bytes(b"half")
            raise error
    assert names(tmp_path) == []


WRITER = """
    import os, sys, time
    os.getpid = lambda: 7  # as in a container: every one begins at 1
    from intactkv_export.work import atomic
    with atomic.output(sys.argv[1]) as file, atomic.work_directory(sys.argv[1]) as directory:
        file.write(b"half"); file.flush(); (directory / "y").write_bytes(b"half")
        print("ready", flush=True); sys.stdin.readline()
        assert (directory / "y").read_bytes() == b"half"
        file.write(sys.argv[2].encode())
"""


def writer(path: Path, text: str) -> subprocess.Popen:
    command = [sys.executable, "-c", textwrap.dedent(WRITER), str(path), text]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout and child.stdout.readline() == "ready\n"
    return child


def test_killed_process_leaves_only_what_the_next_one_removes(tmp_path):
    """Also where the next one has the same process number, and old versions have left theirs."""
    path = tmp_path / "x.ikv"
    killed = writer(path, "")
    write(path, b"another one, at the same time")
    assert len(names(tmp_path)) == 3  # it lives, so its two stay
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    (tmp_path / f".x.ikv.tmp-{os.getpid()}").write_bytes(b"of an old version, whose number is ours now")
    (tmp_path / f".x.ikv.tmp-{os.getpid()}.d").mkdir()
    (tmp_path / ".x.ikv.tmp-notes").write_bytes(b"nobody's business")
    again = writer(path, " whole")
    again.communicate("\n")
    assert again.returncode == 0 and path.read_bytes() == b"half whole"
    assert names(tmp_path) == [".x.ikv.tmp-notes", "x.ikv"]


def test_two_writers_of_one_output(tmp_path):
    """Processes that do not see each other, with the same number: each writes all of its own, the last one stays."""
    path = tmp_path / "x"
    first, second = writer(path, " first"), writer(path, " second")
    second.communicate("\n")
    assert second.returncode == 0 and path.read_bytes() == b"half second"
    first.communicate("\n")
    assert first.returncode == 0 and path.read_bytes() == b"half first"
    assert names(tmp_path) == ["x"]


def test_a_name_taken_over_before_it_is_locked(tmp_path, monkeypatch):
    """Between making a name and locking it another process may take it for a leftover: then another name is made."""
    real, seen = lock.keeps, []

    def overtaken(descriptor: int, path: Path) -> bool:
        if not seen:
            atomic.remove_stale(tmp_path / "x")
        seen.append(path)
        return real(descriptor, path)

    monkeypatch.setattr(lock, "keeps", overtaken)
    write(tmp_path / "x", b"whole")
    assert len(seen) == 2 and names(tmp_path) == ["x"]
    seen.clear()
    with atomic.work_directory(tmp_path / "x") as directory:
        assert directory.is_dir() and len(seen) == 2
    assert names(tmp_path) == ["x"]


def test_without_locks_all_is_written_and_nothing_removed(tmp_path, monkeypatch):
    def none(*_: int) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr("fcntl.flock", none)
    (tmp_path / ".x.tmp-0123456789abcdef").write_bytes(b"perhaps somebody's")
    write(tmp_path / "x", b"whole")
    with atomic.work_directory(tmp_path / "x"):
        pass
    assert names(tmp_path) == [".x.tmp-0123456789abcdef", "x"]


def test_a_kept_directory_is_of_one_process_at_a_time(tmp_path):
    with pytest.raises(ZeroDivisionError), atomic.kept_directory(tmp_path / "x.calibrating") as directory:
        (directory / "data").write_bytes(b"to go on from")
        raise ZeroDivisionError
    with atomic.kept_directory(tmp_path / "x.calibrating"):
        with pytest.raises(IntactKVError, match="another process is at work"):
            with atomic.kept_directory(tmp_path / "x.calibrating"):
                pass
        assert (tmp_path / "x.calibrating/data").read_bytes() == b"to go on from"
    assert names(tmp_path) == []


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_volume_without_fsync_of_directories(tmp_path, monkeypatch, code):
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    if code == errno.EIO:
        with pytest.raises(IntactKVError, match="Input/output error"):
            write(tmp_path / "x", b"whole")
    else:
        write(tmp_path / "x", b"whole")
    assert (tmp_path / "x").read_bytes() == b"whole"


def test_a_directory_that_cannot_be_listed(tmp_path):
    folder = tmp_path / "drop"
    folder.mkdir()
    folder.chmod(0o300)
    try:
        write(folder / "x", b"whole")
        assert (folder / "x").read_bytes() == b"whole"
    finally:
        folder.chmod(0o700)


def test_links_are_followed_and_modes_kept(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    real = tmp_path / "elsewhere" / "real"
    real.write_bytes(b"old")
    real.chmod(0o640)
    link = tmp_path / "link"
    link.symlink_to("elsewhere/real")
    write(link, b"new")
    assert link.is_symlink() and real.read_bytes() == b"new" and stat.S_IMODE(real.stat().st_mode) == 0o640
    (tmp_path / "dangling").symlink_to("elsewhere/to-be")
    write(tmp_path / "dangling", b"new")
    assert (tmp_path / "elsewhere/to-be").read_bytes() == b"new" and names(tmp_path / "elsewhere") == ["real", "to-be"]
    before = os.umask(0o027)
    try:
        write(tmp_path / "fresh", b"")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "fresh").stat().st_mode) == 0o640
    made = tmp_path / "made"
    made.write_bytes(b"newer")
    atomic.publish(made, link)
    assert link.is_symlink() and real.read_bytes() == b"newer" and stat.S_IMODE(real.stat().st_mode) == 0o640


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="needs a second file system")
def test_a_link_to_another_file_system(tmp_path):
    other = Path("/dev/shm") / f"intactkv-test-{os.getpid()}"
    try:
        (tmp_path / "link").symlink_to(other)
        (tmp_path / "made").write_bytes(b"whole")
        atomic.publish(tmp_path / "made", tmp_path / "link")
        assert other.read_bytes() == b"whole" and names(tmp_path) == ["link"] and (tmp_path / "link").is_symlink()
    finally:
        other.unlink(missing_ok=True)


def test_only_regular_files_are_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "pipe", tmp_path / "folder", Path("/dev/full"), Path("/dev/null")):
        with pytest.raises(UsageError, match="only a file can be written"):
            write(path, b"x")
    assert names(tmp_path) == ["folder", "pipe"] and stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_disk_full_is_one_sentence(tmp_path):
    """A limit on the size of files: the write fails in the middle. And a device that is always full."""
    code = """
        import resource, sys
        from intactkv_export.work import atomic
        from intactkv_export.errors import IntactKVError
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            with atomic.output(sys.argv[1]) as file:
                file.write(b"x" * 100_000)
        except IntactKVError as error:
            print(error)
    """
    (tmp_path / "x.ikv").write_bytes(b"old")
    said, _ = in_child(code, tmp_path / "x.ikv").communicate()
    assert "cannot write" in said and "ulimit" in said and said.count("\n") == 1
    assert names(tmp_path) == ["x.ikv"] and (tmp_path / "x.ikv").read_bytes() == b"old"
    if os.path.exists("/dev/full"):
        with pytest.raises(IntactKVError, match="the disk is full"), atomic.explained(tmp_path / "x.ikv"):
            Path("/dev/full").write_bytes(b"x" * 100_000)
    with pytest.raises(IntactKVError, match="No such file"):
        write(tmp_path / "absent" / "x.ikv", b"")


def test_a_name_as_long_as_names_may_be(tmp_path):
    write(tmp_path / ("x" * 255), b"whole")
    with atomic.work_directory(tmp_path / ("x" * 255)):
        pass
    assert names(tmp_path) == ["x" * 255]
