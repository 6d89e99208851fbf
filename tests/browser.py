"""A real browser for the tests: Chromium without a window, spoken to through its debugging pipe."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --disable-dev-shm-usage --remote-debugging-pipe""".split()


class Page:
    """A tab: `ask` a method of the DevTools protocol; what the page reports on its own gathers in `events`."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self.to_browser, self.from_browser = to_browser, os.fdopen(from_browser, "rb")
        self.events: list[dict[str, Any]] = []
        self.number = 0
        self.session: str | None = None

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        os.write(self.to_browser, json.dumps(message | self._session()).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self.number:
                assert "error" not in answer, (method, answer)
                return answer["result"]
            self.events.append(answer)

    def _session(self) -> dict[str, str]:
        return {"sessionId": self.session} if self.session else {}

    def _next(self) -> dict[str, Any]:
        read = bytearray()
        while (byte := self.from_browser.read(1)) != b"\0":
            assert byte, "the browser went away"
            read += byte
        return json.loads(read)

    def open(self, path: Path, width: int, height: int, dark: bool) -> None:
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=True)
        self.ask("Emulation.setEmulatedMedia", features=scheme)
        self.events.clear()
        self.ask("Page.navigate", url=path.as_uri())
        deadline = time.monotonic() + 600
        while self.evaluate("document.readyState") != "complete" or self.evaluate("location.href") == "about:blank":
            assert time.monotonic() < deadline, "the page does not load"

    def evaluate(self, expression: str) -> Any:
        return self.ask("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """The whole page, from top to bottom."""
        data = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    def complaints(self) -> list[Any]:
        """Errors and warnings of the console, and exceptions."""
        kinds = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
        return [event["params"] for event in self.events if event.get("method") in kinds]

    def requests(self) -> list[str]:
        sent = [event for event in self.events if event.get("method") == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in sent]


def _out_of_the_way(descriptor: int) -> int:
    """The same file under a number that is neither 3 nor 4."""
    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD, 20)
    os.close(descriptor)
    return moved


@contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """A tab of a fresh browser with an empty profile. Chromium reads commands from descriptor 3 and answers on 4."""
    assert CHROMIUM is not None
    commands, to_browser, from_browser, answers = (
        _out_of_the_way(end) for pair in (os.pipe(), os.pipe()) for end in pair
    )
    shell = f'exec "$0" "$@" 3<&{commands} 4>&{answers}'
    process = subprocess.Popen(
        ["bash", "-c", shell, CHROMIUM, *FLAGS, f"--user-data-dir={profile}"],
        pass_fds=(commands, answers),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(commands)
    os.close(answers)
    page = Page(to_browser, from_browser)
    try:
        target = page.ask("Target.createTarget", url="about:blank")["targetId"]
        page.session = page.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Log", "Runtime", "Network"):
            page.ask(f"{domain}.enable")
        yield page
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        page.from_browser.close()
        os.close(to_browser)
