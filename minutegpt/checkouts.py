"""Copies of the code, so that a long series of runs trains the code as it was when the series began.

copy_code(ROOT, folder)             # as it is now, with all edits
archive(ROOT, "HEAD", folder)       # as it was committed
edits(committed, edited)            # {"model.py": its new text}
"""

import hashlib
import io
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minutegpt.errors import ROOT, UserError

NOT_CODE = ("data", "dev", "docs", "results", "tests")  # folders without influence on a run; out* and hidden ones too
PACKAGE = "minutegpt"  # all its files count, the others' only where they are Python


def code_files(folder: Path) -> list[Path]:
    """The files that a run depends on, relative to the checkout, sorted."""
    found = [path for path in folder.glob("*.py") if path.is_file()]
    for top in folder.iterdir():
        if top.is_dir() and top.name not in NOT_CODE and not top.name.startswith((".", "out", "__")):
            pattern = "*" if top.name == PACKAGE else "*.py"
            found += [path for path in top.rglob(pattern) if path.is_file() and "__pycache__" not in path.parts]
    return sorted(path.relative_to(folder) for path in found)


def copy_code(source: Path, target: Path) -> None:
    """Raises UserError where `source` has no train.py."""
    if not is_checkout(str(source)):
        raise UserError(f"there is no train.py in {source}. Type the folder of a checkout of this project")
    for name in code_files(source):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)


def git(folder: Path, *argv: str) -> bytes | None:
    """The standard output of a git command in `folder`; None where it fails, or where there is no git."""
    try:
        return subprocess.run(["git", "-C", str(folder), *argv], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


def commit_of(folder: Path, revision: str = "HEAD") -> str:
    """The full hash of a revision; "" where there is none."""
    found = git(folder, "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
    return found.decode().strip() if found else ""


def is_edited(folder: Path) -> bool:
    """Whether code differs from the last commit."""
    changed = (git(folder, "status", "--porcelain", "--untracked-files=all", "--", ".") or b"").decode().splitlines()
    return bool({line[3:].strip('"') for line in changed} & {path.as_posix() for path in code_files(folder)})


def is_checkout(place: str) -> bool:
    return bool(place) and (Path(place) / "train.py").is_file()


def baseline_commit(against: str) -> str:
    """The commit of another checkout, "" where it has none, or of a revision. Raises UserError for anything else."""
    if is_checkout(against):
        return commit_of(Path(against))
    if not (found := commit_of(ROOT, against)):
        raise UserError(f"{against!r} is no revision that git has here, and no checkout. Type a commit or a folder")
    return found


def archive(folder: Path, commit: str, target: Path) -> None:
    """Writes the code of a commit to `target`. Raises UserError where git does not have it."""
    packed = git(folder, "archive", "--format=tar", commit)
    if packed is None:
        raise UserError(f"git does not have the commit {commit!r}. Fetch it, then type the same command again")
    with tarfile.open(fileobj=io.BytesIO(packed)) as files:
        files.extractall(target, filter="data")


def fingerprint(folder: Path) -> str:
    """The SHA-256 of all files that a run depends on, with their names."""
    digest = hashlib.sha256()
    for name in code_files(folder):
        content = (folder / name).read_bytes()
        digest.update(f"{name.as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def edits(old: Path, new: Path) -> dict[str, str | None]:
    """The text of each file of `new` that differs from `old`; None for one that is gone."""
    before, after = set(code_files(old)), set(code_files(new))
    changed = {name for name in after if name not in before or (old / name).read_bytes() != (new / name).read_bytes()}
    texts: dict[str, str | None] = {name.as_posix(): (new / name).read_text(encoding="utf-8") for name in changed}
    return dict(sorted((texts | {name.as_posix(): None for name in before - after}).items()))


def apply_edits(folder: Path, changes: dict[str, str | None]) -> None:
    """Raises UserError for a name that leads out of the folder: changes may come from a stranger's file."""
    for name, text in changes.items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"the edits name {name!r}, a file outside of the checkout. Do not use this file")
        if text is None:
            path.unlink(missing_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="")


def train_defaults(code: Path) -> dict[str, str]:
    """The settings of train.py with their defaults as text, as its --help prints them."""
    printed = subprocess.run([sys.executable, "train.py", "--help"], cwd=code, capture_output=True, text=True).stdout
    return dict(re.findall(r"^(\w+)(?:: \w+)? = (\S+)", printed, re.M))


def place_config(config_file: str, text: str, code: Path, replace: bool) -> str:
    """The path of a config file inside a copy of the code; `text` is written there if it has none, or to replace it.

    A config from outside of the checkout replaces one of the same name.
    """
    given = (ROOT / config_file).resolve()
    inside = given.is_relative_to(ROOT)
    place = given.relative_to(ROOT) if inside else Path("config") / given.name
    if replace or not inside or not (code / place).exists():
        (code / place).parent.mkdir(parents=True, exist_ok=True)
        (code / place).write_text(text, encoding="utf-8")
    return place.as_posix()


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name when that is done."""
    unfinished = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    yield unfinished
    unfinished.rename(folder)


def copy_experiment(base: Path, mine: Path, against: str, edits: dict[str, str | None]) -> None:
    """Puts the code of the variants into `mine` and that of the baseline into `base`, unless it is there already.

    against: another checkout, or a commit, for the baseline, where it has a folder of its own. edits: what makes the
    variants' code out of the baseline's; without it they get the code as it is now.
    """
    if base != mine and not base.exists():
        with new_folder(base) as new:
            if is_checkout(against):
                copy_code(Path(against), new)
            else:
                archive(ROOT, against, new)
    if not mine.exists():
        with new_folder(mine) as new:
            copy_code(base if edits else ROOT, new)
            apply_edits(new, edits)
