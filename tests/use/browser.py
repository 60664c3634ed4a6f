"""A headless Chromium, driven by its DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import aiohttp

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --remote-debugging-port=0"
).split()


class Browser:
    """One page of it. `requested` has the URL of every request that the page made."""

    def __init__(self, runner: asyncio.Runner, connection: aiohttp.ClientWebSocketResponse) -> None:
        self._runner, self._connection = runner, connection
        self._number = 0
        self.requested: list[str] = []
        for domain in ("Network", "Page", "DOM", "Runtime"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Do what the protocol calls `method`; returns its result."""
        return self._runner.run(self._call(method, parameters))

    async def _call(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        self._number += 1
        await self._connection.send_json({"id": self._number, "method": method, "params": parameters})
        while True:
            message = await self._connection.receive_json(timeout=120)
            if message.get("method") == "Network.requestWillBeSent":
                self.requested.append(message["params"]["request"]["url"])
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]

    def value(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def wait_for(self, expression: str, seconds: float = 120) -> Any:
        """The first value of the expression that is not nothing."""
        end = time.monotonic() + seconds
        while not (value := self.value(expression)):
            assert time.monotonic() < end, f"{expression}: {self.value('document.body.innerText')}"
            time.sleep(0.1)
        return value

    def open(self, url: str, width: int = 1280, height: int = 900) -> None:
        """Go to a page, in a window of this size."""
        self.resize(width, height)
        self.call("Page.navigate", url=url)

    def resize(self, width: int, height: int = 900) -> None:
        """Make the window so large."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def choose_file(self, selector: str, path: Path) -> None:
        """Put a file into an <input type=file>."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(path)], nodeId=node)

    def screenshot(self) -> bytes:
        """The whole page as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"])


async def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession()


async def _awaited(connect: Any) -> aiohttp.ClientWebSocketResponse:
    return await connect


@contextmanager
def chromium(program: str, profile: Path) -> Iterator[Browser]:
    """A browser with an empty profile in a folder."""
    command = [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stderr is not None
            found = next(filter(None, (re.search(r"listening on (ws://[^/]+)/", line) for line in process.stderr)))
            address = found[1].replace("ws://", "http://")
            with urlopen(f"{address}/json/list") as answer:
                (page,) = [entry for entry in json.load(answer) if entry["type"] == "page"]
            with asyncio.Runner() as runner:
                session = runner.run(_session())
                connect = session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0)
                yield Browser(runner, runner.run(_awaited(connect)))
                runner.run(session.close())
        finally:
            process.terminate()
