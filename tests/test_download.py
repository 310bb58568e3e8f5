"""Texts by name: found on this machine first, then downloaded; bad networks, and what they leave."""

import hashlib
import http.server
import threading

import pytest
from corpora import run

from minutegpt.data import download
from minutegpt.data.download import TextMissing, download_bytes, find_text
from minutegpt.errors import UserError

CONTENT = b"the text itself\n" * 1000

SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.BaseHTTPRequestHandler):
    asked: list[str] = []  # noqa: RUF012

    def do_GET(self):
        self.asked.append(self.path)
        times = self.asked.count(self.path)
        if self.path == "/missing":
            return self.send_error(404)
        if self.path == "/broken" or (self.path == "/once-broken" and times == 1):
            return self.send_error(503)
        if self.path == "/silent":
            threading.Event().wait(1)
            return None
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        if self.path == "/cut" or (self.path == "/once-cut" and times == 1):
            self.wfile.write(CONTENT[:100])
        elif self.path == "/other":
            self.wfile.write(CONTENT[::-1])
        else:
            self.wfile.write(CONTENT)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def no_wait(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)


@pytest.mark.parametrize("path", ["/good", "/once-broken", "/once-cut"])
def test_download(server, no_wait, path):
    assert download_bytes(server + path, SHA256, timeout=5) == CONTENT


@pytest.mark.parametrize(("path", "said", "times"), [
    ("/missing", "answered 404", 1), ("/broken", "answered 503", 3), ("/cut", "IncompleteRead", 3),
    ("/other", "another sha256", 3), ("/silent", "timed out", 3),
])  # fmt: skip
def test_download_that_fails(server, no_wait, path, said, times):
    with pytest.raises(OSError, match=said):
        download_bytes(server + path, SHA256, timeout=0.2)
    assert Server.asked.count(path) == times


def test_find_text(tmp_path, server, no_wait, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setenv("MINUTEGPT_CACHE", str(cache))
    for wrong in ("/other", "/cut", "/missing"):
        with pytest.raises(TextMissing) as told:
            find_text("t.txt", server + wrong, SHA256)
        for way in (str(cache / "t.txt"), "--input=FILE", "python train.py config/python_code.py"):
            assert way in str(told.value)
        assert not list(tmp_path.rglob("*.*"))  # nothing half is left
    path = find_text("t.txt", server + "/good", SHA256)
    assert path == cache / "t.txt" and path.read_bytes() == CONTENT
    assert find_text("t.txt", server + "/missing", SHA256) == path  # found, not asked for again
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(UserError, match="sha256 differs"):
        find_text("t.txt", server + "/good", SHA256)
    mine = tmp_path / "mine.txt"
    mine.write_text("my own")
    assert find_text("t.txt", server + "/missing", SHA256, given=str(mine)) == mine
    with pytest.raises(UserError, match="no such file"):
        find_text("t.txt", server + "/good", SHA256, given=str(tmp_path / "nothing"))


def test_no_copy_and_no_network_exits_with_3(tmp_path):
    """What train.py falls back on: a proxy that does not answer, as on a machine without a network."""
    nobody = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    done = run("shakespeare_char", f"--data_dir={tmp_path}", MINUTEGPT_CACHE=str(tmp_path / "none"), **nobody)
    assert done.status == 3 and "config/python_code.py" in done.err and "Traceback" not in done.err
    done = run("openwebtext", f"--data_dir={tmp_path}", "--tokenizer=byte", **nobody)
    assert done.status == 3 and "cannot be reached" in done.err and "Traceback" not in done.err, done.err
