"""minutegpt/files.py: whole or not there, at any fault; and one run at a time in a folder."""

import contextlib
import errno
import os
import subprocess
import sys
import time

import pytest
from harness import in_a_fork, posix

from minutegpt import checkpoint, files
from minutegpt.errors import ROOT, UserError
from minutegpt.files import atomic_link, atomic_write, run_lock


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_that_windows_keeps_open_costs_one_checkpoint_and_not_the_run(tmp_path, monkeypatch, capsys):
    state = {"model": {}, "model_config": {}, "step": 1, "config": {}}
    checkpoint.save(tmp_path, state)
    old = (tmp_path / "ckpt.pt").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(files, "WINDOWS", True)
        patch.setattr(files.time, "sleep", lambda seconds: None)
        patch.setattr(files.os, "replace", raises(PermissionError(13, "the file is used by another process")))
        with pytest.raises(files.Busy, match=r"another program has .* open"):
            files.replace(tmp_path / "a", tmp_path / "b")
        checkpoint.save(tmp_path, state | {"step": 2})
    assert "This checkpoint is lost" in capsys.readouterr().err
    assert (tmp_path / "ckpt.pt").read_bytes() == old and not list(tmp_path.glob("*tmp"))
    checkpoint.save(tmp_path, state | {"step": 3})
    assert checkpoint.read_checkpoint(tmp_path / "ckpt.pt")["step"] == 3


def raises(error):
    def function(*args):
        raise error

    return function


def test_a_file_appears_whole_and_replaces_the_old_one(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with atomic_write(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"  # until the end of the block
    assert path.read_bytes() == b"new" and names(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("error", [ValueError("x"), RuntimeError("x"), KeyboardInterrupt(), SystemExit(1)])
def test_any_error_keeps_the_old_file_and_leaves_nothing_behind(tmp_path, error):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(type(error)), atomic_write(path) as file:
        file.write(b"half")
        raise error
    assert path.read_bytes() == b"old" and names(tmp_path) == ["a.bin"]


@posix
def test_the_disk_has_the_bytes_before_the_name_and_the_name_before_it_returns(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (calls.append(name), real(*args))[1])
    with atomic_write(tmp_path / "a.bin") as file:
        file.write(b"new")
    assert calls == ["fsync", "replace", "fsync"]


@posix
@pytest.mark.parametrize("size", [10, 3_000_000])  # inside one write of the file's buffer, and beyond it
def test_a_full_disk_keeps_the_old_file_and_tells_how_much_was_needed(tmp_path, size):
    # a limit on the file's size is the full disk that every machine has; the error is the same OSError
    code = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
from minutegpt.files import atomic_write
from minutegpt.errors import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, ({size // 2}, {size // 2}))
try:
    with atomic_write(sys.argv[1], expected=2_500_000) as file:
        file.write(b"x" * {size})
except UserError as error:
    print(error)
"""
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert "no space for" in done.stdout and "it needs 2.50 MB" in done.stdout and "MB are free" in done.stdout
    assert path.read_bytes() == b"old" and names(tmp_path) == ["a.bin"]


@pytest.mark.skipif(not sys.platform.startswith("linux") or os.geteuid() != 0, reason="mounts a tiny disk: root")
def test_a_disk_that_is_really_full(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("no mounts here")
    try:
        (disk / "there").mkdir()
        (disk / "a.bin").write_bytes(b"old")
        needs = pytest.raises(UserError, match=r"it needs 0\.10 MB and 0\.06 MB are free")
        with needs, atomic_write(disk / "a.bin", expected=100_000) as file:
            file.write(b"x" * 100_000)
        assert (disk / "a.bin").read_bytes() == b"old" and names(disk) == ["a.bin", "there"]
        with pytest.raises(UserError, match="no space"), atomic_write(disk / "b.bin") as file:
            file.write(b"x" * 100_000)
        with contextlib.suppress(OSError), open(disk / "rest.bin", "wb") as file:
            file.write(b"x" * 100_000)  # now nothing is left
        with pytest.raises(UserError, match="no space"):
            run_lock(disk / "there")
        assert "no space" in files._why(OSError(errno.ENOSPC, "no space"), disk / "new" / ".lock", 0)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(UserError, match=r"b\.bin: Read-only file system"), atomic_write(disk / "b.bin") as file:
            file.write(b"x")
        with pytest.raises(UserError, match=r"out/.lock: Read-only file system|out: Read-only file system"):
            run_lock(disk / "out")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@posix
def test_a_folder_without_permission_is_told(tmp_path):
    tmp_path.chmod(0o555)

    def body():
        if os.geteuid() == 0:
            os.setuid(65534)  # root may write anywhere
        for attempt in (lambda: run_lock(tmp_path / "out"), lambda: atomic_write(tmp_path / "a").__enter__()):
            with pytest.raises(UserError, match=r"cannot write .*: Permission denied\. Make it writable"):
                attempt()

    assert in_a_fork(body) == 0
    tmp_path.chmod(0o755)


def test_a_path_that_cannot_be_is_a_users_mistake(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="cannot write"), atomic_write(tmp_path / "file" / "a.bin") as file:
        file.write(b"x")
    with pytest.raises(UserError, match="cannot write"), atomic_write(tmp_path / "nowhere" / "a.bin") as file:
        file.write(b"x")
    with pytest.raises(UserError, match="is a file, and a run needs a folder"):
        run_lock(tmp_path / "file")
    with pytest.raises(UserError, match="cannot write"):
        run_lock(tmp_path / "file" / "out")


@pytest.mark.parametrize("links", [True, False])
def test_a_second_name_is_the_same_file_until_either_is_written_again(tmp_path, monkeypatch, links):
    if not links:  # FAT and some network disks have none: a copy
        monkeypatch.setattr(os, "link", lambda *args: (_ for _ in ()).throw(OSError(errno.EPERM, "no links")))
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"1")
    two.write_bytes(b"2")
    atomic_link(one, two)
    atomic_link(one, two)  # again: renaming a file onto itself does nothing, and would leave a third name
    assert two.read_bytes() == b"1" and names(tmp_path) == ["one", "two"]
    with atomic_write(one) as file:
        file.write(b"3")
    assert two.read_bytes() == b"1"


HOLDER = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from minutegpt.files import run_lock
lock = run_lock(sys.argv[1])
print("locked", flush=True)
time.sleep(60)
"""


def hold(folder):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    return process


def test_two_runs_in_one_folder(tmp_path):
    holder = hold(tmp_path / "out")
    try:
        with pytest.raises(UserError, match=f"another run is writing to .*process {holder.pid}.*--out_dir=NAME"):
            run_lock(tmp_path / "out")
        run_lock(tmp_path / "other").close()
    finally:
        holder.kill()
        holder.wait()


def test_the_lock_dies_with_its_process_and_the_half_written_goes(tmp_path):
    out = tmp_path / "out"
    holder = hold(out)
    (out / "ckpt.pt.123.tmp").write_bytes(b"half")
    (out / "ckpt.pt").write_bytes(b"whole")
    holder.kill()
    holder.wait()
    run_lock(out).close()
    assert names(out) == [".lock", "ckpt.pt"]
    run_lock(out).close()


@posix
def test_a_workers_fork_does_not_keep_the_lock(tmp_path):
    code = HOLDER.replace("time.sleep(60)", "import os\nif os.fork() == 0: time.sleep(5)")
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.wait() == 0
    started = time.monotonic()
    run_lock(tmp_path).close()
    assert time.monotonic() - started < 2  # the fork still sleeps


def test_a_file_system_without_locks_is_no_reason_to_refuse(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(fcntl, "lockf", lambda *args: (_ for _ in ()).throw(OSError(errno.ENOLCK, "no locks")))
    run_lock(tmp_path / "out").close()
    assert files.NO_LOCKS
