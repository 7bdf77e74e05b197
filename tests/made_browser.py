"""Headless Chromium, spoken to through the pipe of its DevTools protocol, for tests."""

import base64
import contextlib
import itertools
import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

PROGRAM = Path("/usr/bin/chromium")
SECONDS = 30.0  # until what is waited for must have come
KEYS = {"Enter": 13, "Escape": 27}


class Page:
    """A page, and what it complained of.

    Attributes:
      faults: errors of the console and of scripts, and requests that failed.
    """

    def __init__(self, to: BinaryIO, back: BinaryIO):
        self._to, self._back, self._numbers, self._session = to, back, itertools.count(1), ""
        self.faults: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "DOM"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Does something, and returns what came of it."""
        number = next(self._numbers)
        session = {"sessionId": self._session} if self._session else {}
        self._to.write(json.dumps({"id": number, "method": method, "params": params, **session}).encode() + b"\0")
        self._to.flush()
        while (told := self._read()).get("id") != number:
            self._note(told)
        assert "error" not in told, (method, told)
        return told["result"]

    def _read(self) -> dict[str, Any]:
        return json.loads(b"".join(iter(lambda: self._back.read(1), b"\0")))

    def _note(self, told: dict[str, Any]) -> None:
        params = told.get("params", {})
        if told.get("method") == "Runtime.exceptionThrown":
            self.faults.append(json.dumps(params["exceptionDetails"]))
        elif told.get("method") == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.faults.append(json.dumps(params["entry"]))
        elif told.get("method") == "Runtime.consoleAPICalled" and params["type"] == "error":
            self.faults.append(json.dumps(params["args"]))

    def run(self, script: str) -> Any:
        """The value of an expression, awaited."""
        told = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    def until(self, script: str) -> Any:
        """Waits until an expression is true, and returns its value."""
        end = time.monotonic() + SECONDS
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"never true: {script}; {self.run('document.body.innerText')}"
            time.sleep(0.02)
        return value

    def open(self, address: str) -> None:
        self.call("Page.navigate", url=address)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def look(self, width: int, height: int, dark: bool = False) -> None:
        """Sets the size of the window and the scheme that the user prefers."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def press(self, key: str, shift: bool = False) -> None:
        about = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key], "modifiers": 8 * shift}
        text = {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **about, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def choose_files(self, selector: str, files: list[Path]) -> None:
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file) for file in files])

    def screenshot(self) -> bytes:
        """A PNG file."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])


@contextlib.contextmanager
def browsing(folder: Path) -> Iterator[Page]:
    """A page of a browser whose profile is in the folder."""
    (there, to), (back, here) = os.pipe(), os.pipe()
    options = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--remote-debugging-pipe",
        f"--user-data-dir={folder}",
    ]
    options += ["--no-first-run", "--disable-background-networking", "--hide-scrollbars"]
    command = ["bash", "-c", f'exec "$0" "$@" 3<&{there} 4>&{here}', str(PROGRAM), *options]
    with (folder / "log").open("w") as log:
        browser = subprocess.Popen(command, pass_fds=(there, here), stderr=log, stdout=log)
    os.close(there)
    os.close(here)
    try:
        with os.fdopen(to, "wb") as into, os.fdopen(back, "rb") as out:
            yield Page(into, out)
    finally:
        browser.terminate()
        browser.wait(timeout=30)
