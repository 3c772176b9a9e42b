"""Headless Chromium, driven through a pipe: no driver program and no open port."""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections import deque

COMMANDS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"),
    *("--no-first-run", "--disable-background-networking", "--disable-sync"),
    *("--disable-component-update", "--remote-debugging-pipe"),
)


def command():
    """The installed browser, or None."""
    return next(filter(None, map(shutil.which, COMMANDS)), None)


class Browser:
    """One tab. `errors` and `requests` grow while pages load.

    Args:
      profile: A new folder for the browser's own files.
    """

    def __init__(self, profile):
        read, self._out = os.pipe()
        self._in, write = os.pipe()
        # The browser reads commands from file 3 and writes answers to file 4. `read` is
        # the lowest free number, so that `write` is not 3.
        begin = ["bash", "-c", f'exec "$@" 3<&{read} 4>&{write}', "bash"]
        self._process = subprocess.Popen(
            [*begin, command(), *FLAGS, f"--user-data-dir={profile}"],
            pass_fds=(read, write),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read)
        os.close(write)
        self._count, self._buffer, self._received = 0, b"", deque()
        self._session = None
        self.errors, self.requests = [], []

    def __enter__(self):
        try:
            target = self("Target.createTarget", url="about:blank")["targetId"]
            attached = self("Target.attachToTarget", targetId=target, flatten=True)
            self._session = attached["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self(f"{domain}.enable")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        self._session = None
        try:
            self("Browser.close")
            self._process.wait(30)
        except (OSError, TimeoutError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        os.close(self._in)
        os.close(self._out)

    def __call__(self, method, **params):
        """Sends a command of the DevTools protocol, and returns its result."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def _next(self, timeout=60):
        while b"\0" not in self._buffer:
            if not select.select([self._in], [], [], timeout)[0]:
                raise TimeoutError(f"no answer from the browser in {timeout} s")
            if not (more := os.read(self._in, 1 << 20)):
                raise OSError("the browser has ended")
            self._buffer += more
        text, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(text)
        self._keep(message.get("method"), message.get("params"))
        return message

    def _keep(self, method, params):
        if method == "Runtime.exceptionThrown":
            self.errors.append(params["exceptionDetails"])
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(params["entry"])
        elif method == "Runtime.consoleAPICalled" and params["type"] == "error":
            self.errors.append(params["args"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])

    def open(self, path, width, height, scheme="light"):
        """Opens a file in a window of this size, and waits until it is ready."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1}
        self("Emulation.setDeviceMetricsOverride", **size, mobile=width < 600)
        preference = {"name": "prefers-color-scheme", "value": scheme}
        self("Emulation.setEmulatedMedia", features=[preference])
        self("Page.navigate", url=path.as_uri())
        self.wait("document.documentElement?.dataset.ready === ''")

    def wait(self, script, seconds=60):
        """Evaluates JavaScript until its value is true, and returns the value."""
        limit = time.monotonic() + seconds
        while not (value := self.run(script)):
            if time.monotonic() > limit or self.errors:
                raise TimeoutError(f"{script}: {value!r}; errors: {self.errors}")
            time.sleep(0.05)
        return value

    def run(self, script):
        """Evaluates JavaScript in the page, and returns its value."""
        found = self("Runtime.evaluate", expression=script, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"])
        return found["result"].get("value")

    def screenshot(self, path, whole=True):
        """Writes a picture of the page."""
        taken = self(
            "Page.captureScreenshot", format="png", captureBeyondViewport=whole
        )
        path.write_bytes(base64.b64decode(taken["data"]))
