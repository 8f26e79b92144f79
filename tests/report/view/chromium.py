"""Chromium without a window, driven through its own pipe: real keys, real sizes, no package."""

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

NAMES = ("chromium", "chromium-browser", "google-chrome")
PATIENCE_S = 120.0
_CODES = {"Escape": 27, "Enter": 13, "ArrowDown": 40, "ArrowUp": 38}


class Chromium:
    """One page of a browser of its own.

    Args:
        profile: an empty folder.
        width, height: of the page, in CSS pixels.
        dark: whether the person wants dark pages.
    """

    def __init__(self, profile: Path, width: int = 1280, height: int = 800, dark: bool = False) -> None:
        program = next(filter(None, map(shutil.which, NAMES)), None)
        assert program, f"none of {', '.join(NAMES)} is installed; make browser says how"
        read_there, self._write = os.pipe()
        self._read, write_there = os.pipe()
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--hide-scrollbars"]
        options += ["--disable-dev-shm-usage", "--no-first-run", f"--user-data-dir={profile}", "about:blank"]
        # The browser reads what it shall do from file 3 and answers into file 4.
        command = f'exec "$0" "$@" 3<&{read_there} 4>&{write_there}'
        self._process = subprocess.Popen(
            ["bash", "-c", command, program, *options],
            pass_fds=(read_there, write_there),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_there)
        os.close(write_there)
        self._buffer, self._number, self._session = b"", 0, None
        self.events: list[dict[str, Any]] = []
        targets = self.send("Target.getTargets")["targetInfos"]
        page = next(one["targetId"] for one in targets if one["type"] == "page")
        self._session = self.send("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")
        self.resize(width, height)
        self.send(
            "Emulation.setEmulatedMedia",
            features=[dict(name="prefers-color-scheme", value="dark" if dark else "light")],
        )

    def __enter__(self) -> Chromium:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()
        os.close(self._read)
        os.close(self._write)

    def resize(self, width: int, height: int) -> None:
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """A command's result; what the browser tells meanwhile goes into ``events``."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (told := self._next()).get("id") != self._number:
            self.events.append(told)
        assert "error" not in told, f"{method}: {told['error']}"
        return told["result"]

    def _next(self) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE_S
        while b"\0" not in self._buffer:
            assert select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))[0], (
                "the browser is silent"
            )
            part = os.read(self._read, 1 << 16)
            assert part, "the browser ended"
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def open(self, page: Path, fragment: str = "") -> None:
        """Opens a file, anew also where only the fragment differs, and waits until its scripts have run."""
        self.send("Page.navigate", url="about:blank")
        self.send("Page.navigate", url=page.resolve().as_uri() + fragment)
        self.wait("document.readyState === 'complete' && location.protocol === 'file:'")

    def wait(self, condition: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not self.run(condition):
            assert time.monotonic() < deadline, f"never: {condition}"
            time.sleep(0.02)

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        result = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def text(self, selector: str) -> str:
        return self.run(f"document.querySelector({json.dumps(selector)}).textContent")

    def key(self, *names: str) -> None:
        """Presses keys, one after the other."""
        for name in names:
            text = {} if name in _CODES else {"text": name}
            code = {"windowsVirtualKeyCode": _CODES[name]} if name in _CODES else {}
            self.send("Input.dispatchKeyEvent", type="keyDown", key=name, **text, **code)
            self.send("Input.dispatchKeyEvent", type="keyUp", key=name, **code)

    def click(self, selector: str) -> None:
        """A press of the mouse in the middle of an element."""
        box = self.run(
            f"""(() => {{
              const one = document.querySelector({json.dumps(selector)});
              one.scrollIntoView({{block: "nearest"}});
              const box = one.getBoundingClientRect();
              return [box.x + box.width / 2, box.y + box.height / 2];
            }})()"""
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def screenshot(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))

    def complaints(self) -> list[dict[str, Any]]:
        """Errors of scripts and of the page, and whatever it asked of a host, since the page was opened."""
        self.run("0")
        return [
            event
            for event in self.events
            if event.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded")
            or (
                event.get("method") == "Network.requestWillBeSent"
                and not event["params"]["request"]["url"].startswith(("file:", "data:", "about:"))
            )
        ]
