"""Chromium without a window, driven over a pipe (the Chrome DevTools Protocol): no port and no package is needed.

with Browser() as browser:
    page = browser.open(path, width=800)
    page.wait("document.title === 'x'")
    page.evaluate("document.querySelector('button').click()")
    page.type("ROMEO:")
    page.screenshot("x.png")
    assert not page.problems and not page.requests
"""

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
KEYS = {"Enter": 13, "Tab": 9, "Escape": 27, "End": 35, "Home": 36, " ": 32,
        "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}  # fmt: skip


def find_browser() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """Skips the test where there is no Chromium; where MINUTEGPT_NO_SKIP is set, that is a failure."""

    def __init__(self, *options: str) -> None:
        program = find_browser()
        if program is None:
            if os.environ.get("MINUTEGPT_NO_SKIP"):
                pytest.fail("chromium is not installed, and MINUTEGPT_NO_SKIP is set")
            pytest.skip("chromium is not installed")
        self.profile = tempfile.TemporaryDirectory(prefix="minutegpt-chromium-", ignore_cleanup_errors=True)
        to_read, self.output = os.pipe()
        self.input, to_write = os.pipe()
        command = [
            program, "--headless=new", "--remote-debugging-pipe", f"--user-data-dir={self.profile.name}",
            "--no-first-run", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
            "--host-resolver-rules=MAP * ~NOTFOUND", *(["--no-sandbox"] if os.geteuid() == 0 else []), *options,
            "about:blank",
        ]  # fmt: skip
        # Chromium reads from descriptor 3 and writes to 4
        shell = ["sh", "-c", f'exec "$0" "$@" 3<&{to_read} 4>&{to_write}']
        self.process = subprocess.Popen(
            [*shell, *command], pass_fds=(to_read, to_write), start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_read)
        os.close(to_write)
        self.buffer = b""
        self.count = 0
        self.pages: dict[str, Page] = {}

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self.output)
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        os.close(self.input)
        self.profile.cleanup()

    def open(self, path: str | Path, width: int = 1000, height: int = 800, dark: bool = False) -> "Page":
        """Opens a file, or an address, in a new tab of this size, and waits until it is loaded."""
        target = self.send("Target.createTarget", {"url": "about:blank"})["targetId"]
        session = self.send("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        page = self.pages[session] = Page(self, session)
        for domain in ("Page", "Runtime", "Network", "Log"):
            page.send(f"{domain}.enable")
        page.resize(width, height)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.send("Emulation.setEmulatedMedia", {"features": [scheme]})
        page.goto(path)
        return page

    def send(self, method: str, values: dict[str, Any] | None = None, session: str = "", seconds: float = 60) -> Any:
        """Sends a command and returns its result. Events that come in between are given to their pages."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": values or {}}
        if session:
            message["sessionId"] = session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self.output, data) :]
        number, end = self.count, time.monotonic() + seconds
        while True:
            answer = self.receive(end - time.monotonic(), method)
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def receive(self, seconds: float, what: str) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.input], [], [], max(0, end - time.monotonic()))
            assert ready, f"no answer from chromium within {seconds:.0f} seconds: {what}"
            part = os.read(self.input, 1 << 20)
            assert part, f"chromium ended during {what}"
            self.buffer += part
        raw, _, self.buffer = self.buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(raw)
        if "method" in message and message.get("sessionId") in self.pages:
            self.pages[message["sessionId"]].event(message["method"], message["params"])
        return message


class Page:
    """A tab. problems: errors and violations of the policy so far; requests: addresses asked for, other than files."""

    def __init__(self, browser: Browser, session: str) -> None:
        self.browser, self.session = browser, session
        self.problems: list[str] = []
        self.requests: list[str] = []

    def send(self, method: str, values: dict[str, Any] | None = None, seconds: float = 60) -> Any:
        return self.browser.send(method, values, self.session, seconds)

    def event(self, method: str, values: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            details = values["exceptionDetails"]
            self.problems.append(details.get("exception", {}).get("description") or details["text"])
        elif method == "Log.entryAdded" and values["entry"]["level"] == "error":
            self.problems.append(values["entry"]["text"])
        elif method == "Runtime.consoleAPICalled" and values["type"] in ("error", "assert"):
            self.problems.append(str([arg.get("value", arg.get("description")) for arg in values["args"]]))
        elif method == "Network.requestWillBeSent" and not values["request"]["url"].startswith(("file:", "blob:")):
            self.requests.append(values["request"]["url"])

    def goto(self, path: str | Path) -> None:
        url = path if isinstance(path, str) and ":" in path else Path(path).resolve().as_uri()
        self.send("Page.navigate", {"url": url})
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def evaluate(self, expression: str, seconds: float = 60) -> Any:
        """The value of an expression, or of its promise."""
        values = {"expression": expression, "awaitPromise": True, "returnByValue": True}
        result = self.send("Runtime.evaluate", values, seconds)
        details = result.get("exceptionDetails")
        assert not details, details.get("exception", {}).get("description", details["text"])
        return result["result"].get("value")

    def wait(self, condition: str, seconds: float = 60) -> None:
        """Waits until an expression is true."""
        end = time.monotonic() + seconds
        while not self.evaluate(condition):
            assert time.monotonic() < end, f"not true within {seconds} seconds: {condition}\n{self.problems}"
            time.sleep(0.02)

    def type(self, text: str) -> None:
        """Types a text where the focus is, character by character."""
        for character in text:
            self.send("Input.dispatchKeyEvent", {"type": "char", "text": character})

    def press(self, key: str) -> None:
        """Presses a key of KEYS."""
        values = {"key": key, "code": "Space" if key == " " else key, "windowsVirtualKeyCode": KEYS[key]}
        text = {"text": "\r"} if key == "Enter" else {"text": " "} if key == " " else {}
        self.send("Input.dispatchKeyEvent", {"type": "keyDown", **values, **text})
        self.send("Input.dispatchKeyEvent", {"type": "keyUp", **values})

    def hover(self, selector: str, press: bool = False) -> None:
        """Moves the mouse to the middle of an element, which is scrolled into view. press: and clicks."""
        x, y = self.evaluate(f"""(() => {{
          const element = document.querySelector({json.dumps(selector)});
          element.scrollIntoView({{ block: "center" }});
          const {{ left, top, width, height }} = element.getBoundingClientRect();
          return [left + width / 2, top + height / 2];
        }})()""")
        kinds = ["mouseMoved", *(["mousePressed", "mouseReleased"] if press else [])]
        for kind in kinds:
            button = {"button": "left", "clickCount": 1} if kind != "mouseMoved" else {}
            self.send("Input.dispatchMouseEvent", {"type": kind, "x": x, "y": y, **button})

    def click(self, selector: str) -> None:
        self.hover(selector, press=True)

    def resize(self, width: int, height: int) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.send("Emulation.setDeviceMetricsOverride", size)

    def screenshot(self, path: str | Path, whole: bool = False) -> None:
        """A PNG of what is visible. whole: of the whole page."""
        result = self.send("Page.captureScreenshot", {"format": "png", "captureBeyondViewport": whole})
        Path(path).write_bytes(base64.b64decode(result["data"]))
