"""Chromium without a window, driven over a pipe with nothing but the standard library (DevTools protocol)."""

import base64
import contextlib
import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1500,1300",
    "--remote-debugging-pipe",
)

#: all text that a reader sees, through shadow roots and frames
TEXT = """
(() => {
  const parts = [];
  const walk = node => {
    if (node.nodeType === Node.TEXT_NODE) { parts.push(node.textContent); return; }
    if (['STYLE', 'SCRIPT', 'TEMPLATE', 'DOM-MODULE'].includes(node.nodeName)) return;
    if (node.nodeType === Node.ELEMENT_NODE && !node.getClientRects().length
        && getComputedStyle(node).display === 'none') return;
    if (node.shadowRoot) walk(node.shadowRoot);
    if (node.nodeName === 'IFRAME' && node.contentDocument) walk(node.contentDocument.body);
    for (const child of node.childNodes) walk(child);
  };
  walk(document.body);
  return parts.join(' ').replace(/\\s+/g, ' ');
})()
"""
#: all elements that match a selector, through shadow roots
ALL = """
const all = selector => {
  const found = [];
  const walk = root => {
    found.push(...root.querySelectorAll(selector));
    for (const element of root.querySelectorAll('*')) if (element.shadowRoot) walk(element.shadowRoot);
  };
  walk(document);
  return found;
};
"""


def find_chromium():
    """Path of a Chromium, or None."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


class Browser:
    """One page of a headless Chromium; a context manager.

    Args:
        path: the program.
        seconds: how long to wait for any answer.
    """

    def __init__(self, path, seconds=60):
        self.seconds = seconds
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()
        # Chromium reads from descriptor 3 and writes to 4: out of the way first, lest one is overwritten
        reads, writes = (fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (theirs_in, theirs_out))

        def place():
            os.dup2(reads, 3)
            os.dup2(writes, 4)

        command = [path, *FLAGS, f"--user-data-dir={self._profile.name}", "about:blank"]
        self._process = subprocess.Popen(
            command, preexec_fn=place, pass_fds=(3, 4), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for fd in (theirs_in, theirs_out, reads, writes):
            os.close(fd)
        self._in, self._out = ours_in, ours_out
        self._buffer = b""
        self._ids = itertools.count(1)
        self._session = None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.send("Page.enable")
        self.send("Runtime.enable")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(OSError):
            os.write(self._out, json.dumps({"id": 0, "method": "Browser.close"}).encode() + b"\0")
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._in)
        os.close(self._out)
        self._profile.cleanup()

    def send(self, method, **params):
        """One command of the protocol; its result."""
        number = next(self._ids)
        message = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + self.seconds
        while True:
            answer = self._receive(deadline)
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def _receive(self, deadline):
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))
            chunk = os.read(self._in, 2**20) if ready else b""
            if not chunk:
                raise TimeoutError(f"no answer from Chromium within {self.seconds} s")
            self._buffer += chunk
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def run(self, script):
        """Value of a JavaScript expression, promises awaited."""
        result = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"].get("exception", {}).get("description", "JavaScript failed"))
        return result["result"].get("value")

    def open(self, url):
        """Go to a page, from a blank one so that only its fragment may differ."""
        self.send("Page.navigate", url="about:blank")
        self.send("Page.navigate", url=url)

    def text(self):
        """What a reader sees."""
        return self.run(TEXT)

    def all(self, selector, expression="e.textContent"):
        """A property of all elements that match, through shadow roots."""
        return self.run(f"{{ {ALL} all({json.dumps(selector)}).map(e => {expression}) }}")

    def wait_for(self, condition, what):
        """Ask until `condition()` is true; its value."""
        deadline = time.monotonic() + self.seconds
        while time.monotonic() < deadline:
            with contextlib.suppress(RuntimeError):  # the page is being replaced
                if value := condition():
                    return value
            time.sleep(0.25)
        raise TimeoutError(f"{what} did not appear within {self.seconds} s; the page says: {self.text()[:2000]}")

    def screenshot(self, path):
        """Save what is drawn as PNG."""
        data = self.send("Page.captureScreenshot", format="png")["data"]
        Path(path).write_bytes(base64.b64decode(data))


@contextlib.contextmanager
def tensorboard(logdir, seconds=90):
    """TensorBoard on a free port of the loopback; its address."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--host", "127.0.0.1", "--port", "0",
               "--load_fast", "false", "--reload_interval", "600"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        address = None
        for line in process.stderr:
            if "http://" in line:
                address = "http://" + line.split("http://")[1].split("/")[0]
                break
        assert address, "TensorBoard did not start"
        deadline = time.monotonic() + seconds
        while not json.load(urllib.request.urlopen(f"{address}/data/runs", timeout=30)):
            assert time.monotonic() < deadline, "TensorBoard has loaded no run"
            time.sleep(0.3)
        yield address
    finally:
        process.terminate()
        process.wait(20)
        process.stderr.close()
