"""A real browser for tests: Debian's Chromium, driven through two pipes by its DevTools protocol.

with Browser() as browser:
    page = browser.open(tmp_path / "run.html", width=800)
    page.press("ArrowRight")
    assert page.js("document.title") == "..." and not page.problems
"""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-extensions", "--remote-debugging-pipe", "--force-color-profile=srgb",
)  # fmt: skip
KEYS = {
    "ArrowRight": 39,
    "ArrowLeft": 37,
    "ArrowUp": 38,
    "ArrowDown": 40,
    "Home": 36,
    "End": 35,
    "Tab": 9,
    "Escape": 27,
}
KEYS |= {"Enter": 13, " ": 32, "PageUp": 33, "PageDown": 34}


class Browser:
    def __enter__(self) -> "Browser":
        assert CHROMIUM, "no chromium"
        self.profile = tempfile.TemporaryDirectory(prefix="minutegpt-browser-", ignore_cleanup_errors=True)
        (in_read, in_write), (out_read, out_write) = os.pipe(), os.pipe()
        # Chromium reads commands from descriptor 3 and answers on 4
        theirs = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (in_read, out_write)]
        self.process = subprocess.Popen(
            [CHROMIUM, *FLAGS, f"--user-data-dir={self.profile.name}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(3, 4),
            preexec_fn=lambda: (os.dup2(theirs[0], 3), os.dup2(theirs[1], 4)),
        )
        for fd in (in_read, out_write, *theirs):
            os.close(fd)
        self.write_to, self.read_from = in_write, out_read
        self.buffer, self.sent, self.pages = b"", 0, dict[str, Page]()
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.write_to)
        os.close(self.read_from)
        self.profile.cleanup()

    def call(self, method: str, session: str = "", seconds: float = 60.0, **params: Any) -> Any:
        """Sends a command and returns its result. Events that come before it go to their pages."""
        self.sent += 1
        number = self.sent
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        os.write(self.write_to, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + seconds
        while True:
            answer = self.receive(end - time.monotonic())
            assert answer is not None, f"no answer to {method} in {seconds} seconds"
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def receive(self, seconds: float) -> dict[str, Any] | None:
        """The next message, whose event its page notes; None where none comes in time."""
        end = time.monotonic() + seconds
        while b"\0" not in self.buffer:
            if not select.select([self.read_from], [], [], max(0.0, end - time.monotonic()))[0]:
                return None
            chunk = os.read(self.read_from, 1 << 20)
            assert chunk, "the browser ended"
            self.buffer += chunk
        raw, _, self.buffer = self.buffer.partition(b"\0")
        message = json.loads(raw)
        page = self.pages.get(message.get("sessionId", ""))
        if page and "method" in message:
            page.note(message["method"], message["params"])
        return message

    def open(
        self, path: Path | str, width: int = 1280, height: int = 800, dark: bool = False, motion: bool = False
    ) -> "Page":
        """A page of a file, when it has loaded. motion: False is a reader who prefers less of it."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self.pages[session] = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        page.call("Page.addScriptToEvaluateOnNewDocument", source=VIOLATIONS)
        page.resize(width, height)
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        features.append({"name": "prefers-reduced-motion", "value": "no-preference" if motion else "reduce"})
        page.call("Emulation.setEmulatedMedia", features=features)
        page.go(path)
        return page


# what the content security policy forbade, for the test to ask for
VIOLATIONS = """
window.violations = [];
addEventListener("securitypolicyviolation", (e) => violations.push(`${e.violatedDirective} ${e.blockedURI}`), true);
"""


class Page:
    """problems: exceptions and errors of the console. requests: addresses other than the file's own."""

    def __init__(self, browser: Browser, session: str) -> None:
        self.browser, self.session, self.loaded = browser, session, 0
        self.problems: list[str] = []
        self.requests: list[str] = []

    def call(self, method: str, **params: Any) -> Any:
        return self.browser.call(method, self.session, **params)

    def note(self, method: str, params: dict[str, Any]) -> None:
        if method == "Page.loadEventFired":
            self.loaded += 1
        elif method == "Runtime.exceptionThrown":
            detail = params["exceptionDetails"]
            self.problems.append(detail.get("exception", {}).get("description") or detail["text"])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"):
            self.problems.append(str(params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.problems.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent" and not params["request"]["url"].startswith(("file:", "blob:")):
            self.requests.append(params["request"]["url"])

    def go(self, path: Path | str) -> None:
        before = self.loaded
        self.call("Page.navigate", url=path.resolve().as_uri() if isinstance(path, Path) else path)
        self.until(lambda: self.loaded > before)

    def reload(self) -> None:
        before = self.loaded
        self.call("Page.reload")
        self.until(lambda: self.loaded > before)

    def until(self, condition: Any, seconds: float = 30.0) -> None:
        """Waits until condition(), or a JavaScript expression, is true; an exception, as while a page loads, is not."""
        end = time.monotonic() + seconds
        if isinstance(condition, str):
            expression = f"(() => {{ try {{ return Boolean({condition}) }} catch {{ return false }} }})()"
            condition = lambda: self.js(expression)  # noqa: E731
        while not condition():
            assert time.monotonic() < end, f"not true after {seconds} seconds: {condition}"
            self.browser.receive(0.05)

    def js(self, expression: str) -> Any:
        """The value of a JavaScript expression; a promise is awaited."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def resize(self, width: int, height: int) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def press(self, key: str, times: int = 1) -> None:
        shape = {"key": key, "code": "Space" if key == " " else key, "windowsVirtualKeyCode": KEYS[key]}
        text = {"Enter": "\r", " ": " "}.get(key)
        for _ in range(times):
            down = {"type": "keyDown", "text": text} if text else {"type": "rawKeyDown"}
            self.call("Input.dispatchKeyEvent", **down, **shape)
            self.call("Input.dispatchKeyEvent", type="keyUp", **shape)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def middle(self, selector: str) -> tuple[float, float]:
        """The middle of an element, scrolled into view."""
        x, y = self.js(f"""(async () => {{
            const node = document.querySelector({json.dumps(selector)});
            node.scrollIntoView({{ block: "center", behavior: "instant" }});
            await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
            const box = node.getBoundingClientRect();
            return [box.left + box.width / 2, box.top + box.height / 2];
        }})()""")
        return x, y

    def hover(self, selector: str) -> None:
        x, y = self.middle(selector)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, selector: str) -> None:
        x, y = self.middle(selector)
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            button = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **button)

    def screenshot(self, path: Path | str, full: bool = False) -> None:
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=full)["data"]
        Path(path).write_bytes(base64.b64decode(data))
