"""A headless Chromium, controlled by its own protocol over a pipe: without a driver, a port or the network.

`HF_ERASURE_CHROMIUM` names the binary; otherwise one is taken from the path. The npm package `@sparticuz/chromium` has
a binary without installation (unpack `bin/chromium.br`, and `bin/al2023.tar.br` beside it for its libraries).
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "chrome-headless-shell")
# Seconds without a message after which a browser hangs; on one busy core a page of this size takes a few seconds.
_PATIENCE = 90


def chromium() -> str:
    """The path of the binary; skips the test if none is found."""
    named = os.environ.get("HF_ERASURE_CHROMIUM")
    found = named or next(filter(None, map(shutil.which, _NAMES)), None)
    if not found:
        pytest.skip(f"no Chromium: HF_ERASURE_CHROMIUM names none, and none of {', '.join(_NAMES)} is on the path")
    return found


class Browser:
    """One tab of a headless Chromium.

    Args:
        folder: The folder of the browser's profile.
    """

    def __init__(self, folder: Path) -> None:
        binary = chromium()
        to_browser, from_browser = os.pipe(), os.pipe()

        def connect() -> None:  # the protocol's pipe is file descriptors 3 and 4
            read, write = os.dup(to_browser[0]), os.dup(from_browser[1])
            os.dup2(read, 3)
            os.dup2(write, 4)

        beside = str(Path(binary).parent)
        libraries = ":".join(filter(None, [os.environ.get("LD_LIBRARY_PATH"), f"{beside}/lib", beside]))
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-zygote", "--single-process"]
        flags += ["--disable-dev-shm-usage", "--hide-scrollbars", "--remote-debugging-pipe", "--no-first-run"]
        self.process = subprocess.Popen(
            [binary, *flags, f"--user-data-dir={folder}", "about:blank"],
            close_fds=False, preexec_fn=connect, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env={**os.environ, "LD_LIBRARY_PATH": libraries, "HOME": str(folder)},
        )  # fmt: skip
        os.close(to_browser[0])
        os.close(from_browser[1])
        self._write, self._read = to_browser[1], from_browser[0]
        self._number, self._buffer, self._session = 0, b"", ""
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._write)
        os.close(self._read)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send one command of the protocol, and return its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def open(self, page: Path, *, width: int, height: int = 900, dark: bool = False) -> None:
        """Show a file in a window of the given size, in light or dark."""
        self.requests.clear()
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Page.navigate", url=page.resolve().as_uri())
        until = time.monotonic() + _PATIENCE
        while self.evaluate("document.readyState + location.protocol") != "completefile:":
            if time.monotonic() > until:
                raise TimeoutError(f"{page} was not loaded in {_PATIENCE} seconds")
            time.sleep(0.05)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(str(result["exceptionDetails"]))
        return result["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """The whole page as a PNG."""
        height = self.evaluate("document.documentElement.scrollHeight")
        width = self.evaluate("innerWidth")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(shot["data"]))

    def _next(self) -> dict[str, Any]:
        """The next message; requests that the page makes are recorded."""
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], _PATIENCE)
            part = os.read(self._read, 1 << 16) if ready else b""
            if not part:
                raise TimeoutError("Chromium went away" if ready else f"Chromium said nothing for {_PATIENCE} seconds")
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        if found.get("method") == "Network.requestWillBeSent":
            self.requests.append(found["params"]["request"]["url"])
        return found
