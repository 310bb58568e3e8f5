"""Runs the page's JavaScript for tests: in Node, or in Chromium.

found = node("output(new Tokenizer(input).encode('a'))", saved, "tokenizer.js")
"""

import json
import os
import shutil
import subprocess
from typing import Any

import pytest
from browser import CHROMIUM, Page
from harness import ROOT

PAGE = ROOT / "minutegpt" / "page"


def sources(*names: str) -> str:
    return "\n".join((PAGE / name).read_text(encoding="utf-8") for name in names)


def node(script: str, value: Any, *files: str, source: str = "") -> Any:
    """Runs a script after these files of the page, or this source. It has `input`, and calls output(result)."""
    program = need("node", shutil.which("node"))
    read = "const input = JSON.parse(require('fs').readFileSync(0, 'utf-8'));\n"
    write = "const output = (value) => require('fs').writeSync(1, JSON.stringify(value));\n"
    done = subprocess.run(
        [program, "-e", "\n".join([source or sources(*files), read, write, script])],
        input=json.dumps(value), capture_output=True, encoding="utf-8", timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def chromium(page: Page, script: str, value: Any, *files: str) -> Any:
    """The same in a page of Chromium."""
    start = f"let found; const input = {json.dumps(value)}; const output = (value) => {{ found = value; }};\n"
    return page.js("(() => {" + "\n".join([sources(*files), start, script, "return found; })()"]))


def need(name: str, program: str | None) -> str:
    """Skips the test where a program is missing. CI sets MINUTEGPT_NO_SKIP: there, that is a failure."""
    if program is None and os.environ.get("MINUTEGPT_NO_SKIP"):
        pytest.fail(f"{name} is not installed, and MINUTEGPT_NO_SKIP is set")
    if program is None:
        pytest.skip(f"{name} is not installed")
    return program


def need_chromium() -> str:
    return need("chromium", CHROMIUM)
