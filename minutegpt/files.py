"""Files that are whole or not there: written under a temporary name, flushed to disk, then renamed.

with atomic_write("out/config.json") as file:
    file.write(b"{}")
"""

import errno
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from minutegpt.errors import UserError

WINDOWS = os.name == "nt"
TEMPORARY = ".minutegpt.tmp"  # ends the name of every unfinished file of ours
OLD_TEMPORARY = re.compile(r"ckpt(-\w+)?\.pt(\.\d+)?\.tmp")  # of earlier versions
NO_SPACE = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, getattr(errno, "ENOTSUP", errno.ENOSYS)}  # some network file systems


def cache_folder() -> Path:
    """Where later processes find what takes time: $MINUTEGPT_CACHE, or ~/.cache/minutegpt. It may not exist."""
    return Path(os.environ.get("MINUTEGPT_CACHE") or os.path.expanduser("~/.cache/minutegpt"))


class Busy(UserError):
    """Windows: another program has a file open that was to be replaced. Later it may not."""


@contextmanager
def atomic_write(path: str | Path, expected: int = 0) -> Iterator[IO[bytes]]:
    """A binary file that gets the name `path` when the block ends without an error; after an error the old file stays.

    expected: the bytes to come, where the caller knows, for the message of a full disk.
    Raises UserError for a full disk or a folder that cannot be written.
    """
    with _renamed(Path(path), expected) as temporary, open(temporary, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def atomic_link(source: Path, target: Path) -> None:
    """Make `target` a second name of `source`, in one step; a copy where the file system has no hard links.

    No file is ever changed in place, so writing one name later does not change the other.
    """
    with _renamed(target, source.stat().st_size) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


@contextmanager
def _renamed(path: Path, expected: int) -> Iterator[Path]:
    """A temporary name in the folder of `path`, renamed to it when the block ends well. A rename cannot cross disks."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        try:
            temporary.unlink(missing_ok=True)
            yield temporary
            replace(temporary, path)
        finally:
            with suppress(OSError):
                temporary.unlink()  # gone where all went well, unless both names were one file already
    except (OSError, RuntimeError) as error:
        cause: BaseException | None = error
        while isinstance(cause, RuntimeError):  # torch.save wraps the disk's error in its own
            cause = cause.__cause__ or cause.__context__
        if isinstance(cause, OSError):
            raise UserError(_why(cause, path, expected)) from error
        raise


def replace(source: Path, target: Path) -> None:
    """os.replace, flushed to disk."""
    for patience in range(300, -1, -1):
        try:
            os.replace(source, target)
            break
        except PermissionError:  # Windows, while a sample.py or a virus scanner has the old file open
            if not WINDOWS:
                raise
            if not patience:
                raise Busy(f"another program has {target} open, and keeps it. Close that program") from None
            time.sleep(0.1)
    with suppress(OSError):  # Windows cannot open a folder
        folder = os.open(target.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def run_lock(out_dir: str | Path) -> IO[str]:
    """Makes `out_dir` and locks it for this process. Keep the returned file: closing it releases the lock.

    The operating system holds the lock, so it dies with its process, however that ends. What a killed run
    left half-written is removed. Raises UserError where another run has the lock, or the folder is read-only.
    """
    path = Path(out_dir) / ".lock"
    if os.path.isfile(out_dir):
        raise UserError(f"{out_dir} is a file, and a run needs a folder: --out_dir=NAME")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="utf-8")
    except OSError as error:
        raise UserError(_why(error, path, 0)) from error
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(1 << 30)  # a byte far after the text: on Windows a lock also prevents reading
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: a forked worker would keep that alive
    except OSError as error:
        if error.errno not in NO_LOCKS:
            file.seek(0)
            holder = file.read(100).strip() or "by an unknown process"
            file.close()
            raise UserError(
                f"another run is writing to {out_dir} ({holder}): wait for it, stop it, or give this run a folder "
                "of its own with --out_dir=NAME"
            ) from None
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
    except OSError as error:
        with suppress(OSError):
            file.close()
        raise UserError(_why(error, path, 0)) from error
    for leftover in path.parent.glob("*.tmp"):  # somebody else's are not touched
        if leftover.name.endswith(TEMPORARY) or OLD_TEMPORARY.fullmatch(leftover.name):
            with suppress(OSError):  # open in another program, as a virus scanner
                leftover.unlink()
    return file


def _why(error: OSError, path: Path, expected: int) -> str:
    """What to tell of a file that could not be written; expected in bytes, 0 where unknown."""
    if error.errno not in NO_SPACE:
        return f"cannot write {path}: {error.strerror}. Make it writable, or write elsewhere: --out_dir=NAME"
    free = shutil.disk_usage(next(folder for folder in path.absolute().parents if os.path.exists(folder))).free
    needs = f"it needs {expected / 1e6:,.2f} MB and " if expected else ""
    return f"no space for {path}: {needs}{free / 1e6:,.2f} MB are free. Make room, or write elsewhere: --out_dir=NAME"
