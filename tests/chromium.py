"""Drives a headless Chromium through the pipe of its DevTools protocol, without another package.

https://chromedevtools.github.io/devtools-protocol describes the methods.
"""

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
TIMEOUT = 120  # seconds, after which a browser that hangs is ended
BINARY = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)

Send = Callable[..., dict[str, Any]]


@contextlib.contextmanager
def opened(page: Path, width: int, height: int = 1000, dark: bool = False) -> Iterator[Send]:
  """Opens a page in a window of `width` x `height` pixels, in the light or the dark theme.

  Yields `send(method, **parameters)`, which returns the result of a method of the protocol.
  """
  with (
    tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
    _started(profile) as send,
  ):
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    send("Emulation.setDeviceMetricsOverride", **size)
    theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    send("Emulation.setEmulatedMedia", features=[theme])
    send("Page.navigate", url=page.as_uri())
    ready = "new Promise(done => document.readyState == 'complete' ? done() : onload = done)"
    value(send, ready)
    yield send
    send("Browser.close")


def value(send: Send, script: str) -> Any:
  """What a script in the page evaluates to; of a promise, what it is fulfilled with."""
  answer = send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
  assert "exceptionDetails" not in answer, answer
  return answer["result"].get("value")


@contextlib.contextmanager
def _started(profile: str) -> Iterator[Send]:
  """A browser with one empty page."""
  (commands_out, commands_in), (answers_out, answers_in) = os.pipe(), os.pipe()
  options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
  options += ["--disable-background-networking", "--hide-scrollbars", f"--user-data-dir={profile}"]
  # The browser reads commands from its file 3 and writes answers to its file 4.
  shell = f'exec "$0" "$@" 3<&{commands_out} 4>&{answers_in}'
  process = subprocess.Popen(
    ["bash", "-c", shell, str(BINARY), *options, "--remote-debugging-pipe"],
    pass_fds=(commands_out, answers_in),
    stderr=subprocess.DEVNULL,
  )
  os.close(commands_out)
  os.close(answers_in)
  timer = threading.Timer(TIMEOUT, process.kill)
  timer.start()
  numbers, session = itertools.count(1), {}
  with open(commands_in, "wb", buffering=0) as commands, open(answers_out, "rb") as answers:

    def read() -> dict[str, Any]:
      message = bytearray()
      while (byte := answers.read(1)) != b"\0":
        assert byte, "the browser has ended"
        message += byte
      return json.loads(message)

    def send(method: str, **parameters: Any) -> dict[str, Any]:
      number = next(numbers)
      message = {"id": number, "method": method, "params": parameters, **session}
      commands.write(json.dumps(message).encode() + b"\0")
      while (answer := read()).get("id") != number:
        pass  # an event
      assert "error" not in answer, (method, answer)
      return answer["result"]

    try:
      target = send("Target.createTarget", url="about:blank")["targetId"]
      attached = send("Target.attachToTarget", targetId=target, flatten=True)
      session["sessionId"] = attached["sessionId"]
      yield send
    finally:
      timer.cancel()
      process.terminate()
      process.wait(timeout=30)
