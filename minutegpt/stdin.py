"""Whether the text on standard input is meant for this program."""

import os
import select
import stat
import sys
from contextlib import suppress
from pathlib import Path

SHELLS = {"sh", "bash", "dash", "ash", "zsh", "ksh", "mksh", "fish", "busybox"}


def has_input() -> bool:
    """Whether standard input has something to read right now. An open terminal and an idle pipe do not."""
    if sys.stdin is None or sys.stdin.isatty():
        return False
    try:
        return bool(select.select([sys.stdin], [], [], 0)[0])
    except (OSError, ValueError):  # Windows can ask sockets only
        return False


def belongs_to_shell() -> bool:
    """Whether standard input is also a shell's, as in `while read line; do python sample.py; done < list`.

    There, a program that reads it takes the lines away from the loop. A file that was partly read already is a shell's
    too. Where there is no /proc (macOS), a pipe that is shared with a shell is not recognised.
    """
    own = os.fstat(sys.stdin.fileno())
    if stat.S_ISCHR(own.st_mode):  # /dev/null: nothing can be taken away
        return False
    if stat.S_ISREG(own.st_mode) and os.lseek(sys.stdin.fileno(), 0, os.SEEK_CUR) > 0:
        return True
    process = os.getppid()
    with suppress(OSError):
        while os.path.samestat(own, os.stat(f"/proc/{process}/fd/0")):  # up the chain: uv, timeout ... pass theirs on
            name, _, fields = Path(f"/proc/{process}/stat").read_text().partition("(")[2].rpartition(")")
            if name in SHELLS:
                return True
            process = int(fields.split()[1])
    return False
