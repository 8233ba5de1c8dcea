"""A browser without a window, driven by chromedriver's own HTTP protocol (W3C WebDriver): no package is needed for it."""

import base64
import json
import os
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

START_SECONDS = 60
CHROME = ("chromium", "chromium-browser", "google-chrome")


def missing() -> str:
    """Why no page can be opened here; "" where one can."""
    if not any(map(shutil.which, CHROME)):
        return "no Chromium here: apt-get install chromium chromium-driver"
    return (
        "" if shutil.which("chromedriver") else "no chromedriver: apt-get install chromium-driver"
    )


class Browser:
    """One window."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        arguments = ["--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        if os.geteuid() == 0:  # Chromium's sandbox refuses to run as root
            arguments.append("--no-sandbox")
        options = {"args": arguments, "binary": next(filter(None, map(shutil.which, CHROME)))}
        capabilities = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        found = self._post("/session", {"capabilities": {"alwaysMatch": capabilities}})
        self._session = f"/session/{found['sessionId']}"

    def _post(self, path: str, values: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            self._endpoint + path,
            json.dumps(values).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=START_SECONDS) as answer:
            return json.load(answer)["value"]

    def open(self, page: Path, fragment: str = "") -> None:
        """Open a page from disk, and wait until it is loaded."""
        self._post(f"{self._session}/url", {"url": "about:blank"})  # else a fragment loads nothing
        self.log()
        self._post(f"{self._session}/url", {"url": page.as_uri() + fragment})

    def run(self, script: str, *arguments: Any) -> Any:
        """What a function's body returns."""
        return self._post(
            f"{self._session}/execute/sync", {"script": script, "args": list(arguments)}
        )

    def wait(self, script: str, *arguments: Any) -> Any:
        """The same, of a body that calls its last argument when it is ready."""
        return self._post(
            f"{self._session}/execute/async", {"script": script, "args": list(arguments)}
        )

    def press(self, *keys: str) -> None:
        """Keys, one after the other, wherever the focus is."""
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self._post(
            f"{self._session}/actions",
            {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]},
        )

    def log(self) -> list[dict[str, Any]]:
        """What the console has said since it was asked last."""
        return list(self._post(f"{self._session}/se/log", {"type": "browser"}))

    def tell(self, command: str, **parameters: Any) -> Any:
        """A command of Chromium's DevTools protocol."""
        return self._post(
            f"{self._session}/goog/cdp/execute", {"cmd": command, "params": parameters}
        )

    def look(self, *, width: int = 1280, height: int = 900, scheme: str = "light") -> None:
        """Another size of the window, and light or dark."""
        self.tell(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.tell("Emulation.setEmulatedMedia", features=features)

    def picture(self, path: Path) -> None:
        """A screenshot, as PNG."""
        path.write_bytes(base64.b64decode(self.tell("Page.captureScreenshot")["data"]))

    def close(self) -> None:
        """End it."""
        request = urllib.request.Request(self._endpoint + self._session, method="DELETE")
        urllib.request.urlopen(request, timeout=START_SECONDS).close()


@contextmanager
def browser() -> Iterator[Browser]:
    """A browser, and its end."""
    driver = subprocess.Popen(
        ["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert driver.stdout
        port = next(
            line.rstrip().rstrip(".").split()[-1]
            for line in driver.stdout
            if "started successfully on port" in line
        )
        window = Browser(f"http://127.0.0.1:{port}")
        try:
            yield window
        finally:
            window.close()
    finally:
        driver.terminate()
        driver.wait()
