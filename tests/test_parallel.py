"""Parallel work: in order, with few pieces in memory, and without processes that outlive their parent."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from corpora import KILLABLE, documents, write_documents

from minutegpt.data.parallel import batches, ordered_map
from minutegpt.errors import ROOT


def test_batches_end_at_the_size():
    assert list(batches(["a", "bb", "ccc", "d"], 3)) == [["a", "bb"], ["ccc"], ["d"]]
    assert list(batches([], 3)) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order_and_few_pieces_are_held(workers):
    taken, held = [], []

    def pieces():
        for i in range(40):
            taken.append(i)
            yield str(i)

    for done, result in enumerate(ordered_map(int, pieces(), workers)):
        assert result == done
        held.append(len(taken) - done)
    assert done == 39 and max(held) <= 2 * workers + 2


def test_a_single_piece_is_done_in_this_process():
    assert list(ordered_map(lambda piece: (piece, os.getpid()), ["x"], 2)) == [("x", os.getpid())]  # no lambda travels


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_a_worker_that_dies_is_reported(tmp_path):
    script = tmp_path / "dies.py"
    script.write_text(f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from minutegpt.data.parallel import ordered_map
from minutegpt.errors import UserError

def die(piece):
    os.kill(os.getpid(), 9)

if __name__ == "__main__":
    try:
        list(ordered_map(die, "abc", 2))
    except UserError as error:
        print(error)
""")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert "a worker process died. If memory ran out, use fewer of them: --workers=1" in done.stdout, done


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
@pytest.mark.slow
def test_workers_end_with_a_killed_parent(tmp_path):
    folder = write_documents(tmp_path / "mine", "jsonl", documents(20_000))
    script = tmp_path / "unique_name_of_a_script.py"
    script.write_text(KILLABLE.format(root=str(ROOT), folder=str(folder), out=str(tmp_path), workers=2))
    process = subprocess.Popen([sys.executable, str(script)])

    def children():
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                pid, parent = path.parent.name, path.read_text().rpartition(")")[2].split()[1]
                found += [pid] * (parent == str(process.pid))
            except OSError:
                continue
        return found

    deadline = time.monotonic() + 30
    while len(kids := children()) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1.0)
    kids = children()
    process.kill()
    process.wait()
    assert len(kids) >= 2
    while any(Path(f"/proc/{kid}").exists() for kid in kids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{kid}").exists() for kid in kids)
