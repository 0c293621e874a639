"""A headless Chromium that tests press and look at: the few calls of the DevTools protocol that
this takes, over a pipe.

A library for this (Playwright, Selenium) would bring a driver of 40 MB and more, of the right
version, to every machine that runs tests. https://chromedevtools.github.io/devtools-protocol/
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
KEYS = {
    "ArrowLeft": 37,
    "ArrowRight": 39,
    "ArrowDown": 40,
    "End": 35,
    "Home": 36,
    "Tab": 9,
    "Enter": 13,
}


class Browser:
    """One page. `requests` are the addresses it asked for, `complaints` what went to the console or
    was thrown."""

    def __init__(self, inbox: int, outbox: int) -> None:
        self._inbox, self._outbox, self._buffer, self._count = inbox, outbox, b"", 0
        self._session: str | None = None
        self.requests: list[str] = []
        self.complaints: list[str] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        self.send(
            "Network.emulateNetworkConditions",
            offline=True,
            latency=0,
            downloadThroughput=0,
            uploadThroughput=0,
        )

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a command; what happens in the meantime is noted."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters} | (
            {"sessionId": self._session} if self._session else {}
        )
        os.write(self._outbox, json.dumps(message).encode() + b"\0")
        number = self._count
        while (answer := self._receive()).get("id") != number:
            pass
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def open(
        self, path: Path, *, width: int = 1200, height: int = 900, phone: bool = False
    ) -> None:
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=phone,
        )
        self.send("Page.navigate", url=path.as_uri())
        while not self.evaluate("document.readyState === 'complete'"):
            time.sleep(0.02)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, (expression, answer["exceptionDetails"])
        return answer["result"].get("value")

    def click(self, selector: str) -> None:
        """With the mouse, in the middle of what the selector finds."""
        place = f"document.querySelector({json.dumps(selector)})"
        self.evaluate(f"{place}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
        x, y = self.evaluate(
            "(({x, y, width, height}) => [x + width / 2, y + height / 2])"
            f"({place}.getBoundingClientRect())"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str, times: int = 1) -> None:
        code = KEYS.get(key) or ord(key.upper())
        text = {"text": key} if key not in KEYS else {"text": "\r"} if key == "Enter" else {}
        for _ in range(times):
            self.send(
                "Input.dispatchKeyEvent",
                type="keyDown",
                key=key,
                windowsVirtualKeyCode=code,
                **text,
            )
            self.send("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def screenshot(self) -> np.ndarray:
        """uint8 RGB of what is seen."""
        png = base64.b64decode(self.send("Page.captureScreenshot")["data"])
        return np.asarray(cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR_RGB))

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            assert select.select([self._inbox], [], [], 20)[0], "the browser says nothing"
            part = os.read(self._inbox, 1 << 20)
            assert part, "the browser has ended"
            self._buffer += part
        text, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(text)
        parameters = message.get("params", {})
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        elif message.get("method") in (
            "Runtime.consoleAPICalled",
            "Runtime.exceptionThrown",
            "Log.entryAdded",
        ):
            self.complaints.append(json.dumps(parameters))
        return message


def chromium() -> str | None:
    return next((path for path in map(shutil.which, NAMES) if path), None)


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """Chromium with its profile in `folder`, ended at the end."""
    program = chromium()
    assert program
    (its_inbox, outbox), (inbox, its_outbox) = os.pipe(), os.pipe()
    # It reads from descriptor 3 and writes to 4; a shell puts ours there.
    command = f'exec "$0" "$@" 3<&{its_inbox} 4>&{its_outbox}'
    options = (
        "--headless",
        "--remote-debugging-pipe",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        f"--user-data-dir={folder}",
    )
    process = subprocess.Popen(
        ["bash", "-c", command, program, *options],
        pass_fds=(its_inbox, its_outbox),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(its_inbox)
    os.close(its_outbox)
    try:
        page = Browser(inbox, outbox)
        yield page
        page._session = None
        page.send("Browser.close")
        process.wait(20)
    finally:
        process.kill()
        process.wait()
        os.close(inbox)
        os.close(outbox)
