"""Headless Chromium, spoken to over its debugging pipe: what a page looks like, and what it says about itself.

The DevTools protocol over `--remote-debugging-pipe` is JSON messages that end in a zero byte, on file descriptors 3
(to the browser) and 4 (from it). No port, no web socket, no driver to install.
"""

import base64
import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome", "chrome")

# A page of a few hundred kilobytes takes a second to lay out on a busy machine; this is for a browser that hangs.
PATIENCE_SECONDS = 120

# Descriptors from here on are nobody's by convention.
HIGH = 10


def find() -> str | None:
    """The browser's path, if one is installed."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One running browser with one tab."""

    def __init__(self, process: subprocess.Popen, to_browser: int, from_browser: int) -> None:
        self.process = process
        self._out, self._in = to_browser, from_browser
        self._buffer = b""
        self._sent = 0
        self._session: str | None = None
        self.complaints: list[str] = []

    def attach(self) -> None:
        """Open the tab and ask to be told what goes on in it."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Ask the browser for something and wait for its answer; what it complains of meanwhile is kept."""
        self._sent += 1
        message = {"id": self._sent, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            answer = self._receive(deadline)
            if answer.get("id") == self._sent:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self._note(answer)

    def open(self, path: Path, width: int, height: int, *, dark: bool = False) -> None:
        """Show a file at a size, in light or dark mode."""
        self.complaints.clear()
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=True)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=path.resolve().as_uri())
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (event := self._receive(deadline)).get("method") != "Page.loadEventFired":
            self._note(event)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def screenshot(self, path: Path, top: int = 0, height: int | None = None) -> None:
        """The whole page, beyond the window too, or so much of it."""
        clip = {}
        if height is not None:
            width = self.evaluate("document.documentElement.scrollWidth")
            clip = {"clip": {"x": 0, "y": top, "width": width, "height": height, "scale": 1}}
        image = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, **clip)["data"]
        path.write_bytes(base64.b64decode(image))

    def close(self) -> None:
        """End the browser, its children with it; by force if it does not answer."""
        self._session = None
        with contextlib.suppress(OSError, RuntimeError, TimeoutError):
            self.call("Browser.close")
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _receive(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the browser said nothing for {PATIENCE_SECONDS} s")
            chunk = os.read(self._in, 1 << 20)
            if not chunk:
                raise RuntimeError("the browser closed its pipe")
            self._buffer += chunk
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        """Keep errors, and every request for anything but the page itself."""
        method, said = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.complaints.append(str(said["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled":
            self.complaints.append(f"console.{said['type']}: {said['args']}")
        elif method == "Log.entryAdded":
            self.complaints.append(f"{said['entry']['level']}: {said['entry']['text']}")
        elif method == "Network.requestWillBeSent" and said["type"] != "Document":
            self.complaints.append(f"asked for {said['request']['url']}")


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """Start Chromium with a profile of its own, and end it."""
    executable = find()
    if executable is None:
        raise FileNotFoundError(f"none of {', '.join(NAMES)} is installed")
    read_commands, write_commands = os.pipe()
    read_answers, write_answers = os.pipe()
    # The browser wants them at 3 and 4. Moved high first, so that neither lands on the other.
    high_commands = fcntl.fcntl(read_commands, fcntl.F_DUPFD, HIGH)
    high_answers = fcntl.fcntl(write_answers, fcntl.F_DUPFD, HIGH)

    command = [
        executable,
        "--headless=new",
        "--remote-debugging-pipe",
        "--no-sandbox",  # containers, and CI as root
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--disable-background-networking",
        "--force-color-profile=srgb",
        f"--user-data-dir={profile}",
    ]
    # A shell places the descriptors: Popen can only inherit them as they are numbered.
    script = f'exec "$@" 3<&{high_commands} 4>&{high_answers} {high_commands}<&- {high_answers}>&-'
    process = subprocess.Popen(
        ["bash", "-c", script, "bash", *command],
        pass_fds=(high_commands, high_answers),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for descriptor in (read_commands, write_answers, high_commands, high_answers):
        os.close(descriptor)
    running = Browser(process, write_commands, read_answers)
    try:
        running.attach()
        yield running
    finally:
        running.close()
        os.close(write_commands)
        os.close(read_answers)
