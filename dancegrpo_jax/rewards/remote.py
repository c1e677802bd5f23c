"""A reward behind HTTP, for a model that runs in PyTorch or on another machine.

benchmarks/reward_server.py is a server. A request is a POST of b samples in one of two formats,
with 8-bit pixels `[b, (f,) h, w, 3]`:

  png: application/json, {"images": [base64 of a PNG], "prompts": [text], "metadata": [object or
    null]}
  npz: application/octet-stream, numpy's format with `pixels` and `request`, which is the bytes of
    JSON {"prompts", "metadata"}, and of clips also "fps", frames a second

The answer has status 200 and is JSON {"scores": [number or null]} with b scores. A null is a sample
that could not be scored.
"""

import base64
import http.client
import io
import json
import math
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import SplitResult, urlsplit

import numpy as np
from PIL import Image

from dancegrpo_jax import strict_json
from dancegrpo_jax.rewards.base import Reward, RewardKind
from dancegrpo_jax.rewards.failures import NotReadyError
from dancegrpo_jax.types import Example, Media

FORMATS = ("png", "npz")
# Seconds of the pauses before retries. Each pause is twice as long as the one before it.
_FIRST_PAUSE = 0.5
_LONGEST_PAUSE = 30.0
_LONGEST_ANSWER = 1 << 24  # bytes


class RemoteError(RuntimeError):
  """A batch could not be scored. The message has the address, the reason and the attempts."""


class ServerDownError(RemoteError, NotReadyError):
  """No attempt reached a server that is up: no connection, a timeout, status 429 or above 500."""


class TransientError(Exception):
  """An attempt failed, and another one may not: no connection, a timeout, status 429 or 5xx.

  Attributes:
    status: of the answer, 0 where there was none.
  """

  def __init__(self, message: str, status: int = 0):
    super().__init__(message)
    self.status = status


def build(
  url: str, timeout: float, retries: int, format: str, pause: Callable[[float], None] = time.sleep
) -> Reward:
  """The reward "remote".

  `score` raises RemoteError where the whole batch failed. As for any host reward, the loop reports
  this and makes all scores NaN. Before a run, a server that is not up is a notice, and one that
  answers with an error or with something else than scores is a mistake. A sample alone is NaN if
  its score is null or not finite, or if its pixels are not finite.

  Args:
    url: the address of the scorer, http:// or https://.
    timeout: seconds of one attempt, from the connection to the end of the answer.
    retries: attempts after the first one.
    format: "png" or "npz".
    pause: the function that sleeps between attempts.

  Raises:
    ValueError: a value can't be used; the message names the field of config.reward.remote.
  """
  address = _address(url)
  if timeout <= 0:
    raise ValueError(f"config.reward.remote.timeout = {timeout!r}: must be above 0")
  if retries < 0:
    raise ValueError(f"config.reward.remote.retries = {retries!r}: must be at least 0")
  if format not in FORMATS:
    raise ValueError(
      f"config.reward.remote.format = {format!r}: unknown; one of {', '.join(FORMATS)}"
    )
  encode = {"png": _as_png, "npz": _as_npz}[format]

  def score(media: Media, examples: list[Example]) -> dict[str, np.ndarray]:
    pixels = np.asarray(media.pixels)
    finite = np.isfinite(pixels).reshape(len(pixels), -1).all(axis=1)
    bytes8 = np.round(np.clip(np.nan_to_num(pixels), 0, 1) * 255).astype(np.uint8)
    request: dict[str, Any] = {
      "prompts": [example.prompt for example in examples],
      "metadata": [example.metadata for example in examples],
    }
    if media.fps is not None:
      request["fps"] = media.fps
    body, content_type = encode(bytes8, request)

    def attempt() -> np.ndarray:
      return _scores(_post(address, body, content_type, timeout), len(examples))

    scores = with_retries(attempt, url, retries, pause)
    return {"remote": np.where(finite, scores, np.nan).astype(np.float32)}

  def refusal(shape: tuple[int, ...]) -> str:
    if len(shape) == 3 or format == "npz":
      return ""
    return (
      f"config.reward.remote.format = {format!r}: sends images, and the model draws {shape[0]}"
      " frames; set it to npz"
    )

  return Reward(name="remote", kind="host", terms=("remote",), score=score, refusal=refusal)


KIND = RewardKind(build=lambda name, section, files, networks: build(**section), section="remote")


def _address(url: str) -> SplitResult:
  """The parts of a URL.

  Raises:
    ValueError: it can't be used; the message names the field of the config.
  """
  try:
    address = urlsplit(url)
    usable = address.scheme in ("http", "https") and bool(address.hostname) and address.port != 0
  except ValueError:
    usable = False
  if not usable:
    raise ValueError(
      f"config.reward.remote.url = {url!r}: must be http://HOST[:PORT]/PATH or https://..."
    )
  return address


def _as_png(pixels: np.ndarray, request: dict[str, Any]) -> tuple[bytes, str]:
  """Body and content type of a request with PNG images."""
  if pixels.ndim != 4:
    raise RemoteError(
      f"reward remote: format png sends images, not video {list(pixels.shape)}; use npz"
    )
  images = []
  for image in pixels:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=1)
    images.append(base64.b64encode(buffer.getvalue()).decode())
  return strict_json.dumps({"images": images, **request}).encode(), "application/json"


def _as_npz(pixels: np.ndarray, request: dict[str, Any]) -> tuple[bytes, str]:
  """Body and content type of a request in numpy's format."""
  buffer = io.BytesIO()
  np.savez(
    buffer, pixels=pixels, request=np.frombuffer(strict_json.dumps(request).encode(), np.uint8)
  )
  return buffer.getvalue(), "application/octet-stream"


def with_retries(
  attempt: Callable[[], np.ndarray], url: str, retries: int, pause: Callable[[float], None]
) -> np.ndarray:
  """The result of the first attempt that succeeds.

  Raises:
    RemoteError: no attempt succeeded, or one raised RemoteError, which another attempt would raise
      again. It is a ServerDownError where no server is up.
  """
  for number in range(retries + 1):
    try:
      return attempt()
    except TransientError as error:
      if number == retries:
        # Status 500 is what an exception in the scorer itself becomes.
        kind = RemoteError if error.status == 500 else ServerDownError
        raise kind(f"{url}: {error}; attempts: {number + 1}") from error
      pause(min(_FIRST_PAUSE * 2**number, _LONGEST_PAUSE))
    except RemoteError as error:
      raise RemoteError(f"{url}: {error}") from error
  raise AssertionError


def _post(address: SplitResult, body: bytes, content_type: str, timeout: float) -> bytes:
  """The answer to one request.

  Raises:
    TransientError: another attempt may succeed.
    RemoteError: another attempt would fail too.
  """
  deadline = time.monotonic() + timeout
  is_https = address.scheme == "https"
  connection_type = http.client.HTTPSConnection if is_https else http.client.HTTPConnection
  connection = connection_type(address.hostname or "", address.port, timeout=timeout)
  path = (address.path or "/") + (f"?{address.query}" if address.query else "")
  headers = {"Content-Type": content_type, "Accept": "application/json"}
  try:
    connection.request("POST", path, body, headers)
    connection.sock.settimeout(max(deadline - time.monotonic(), 1e-3))
    response = connection.getresponse()
    answer = _read(response, deadline)
  except (OSError, http.client.HTTPException) as error:
    reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    raise TransientError(reason) from error
  finally:
    connection.close()
  if response.status != 200:
    text = " ".join(answer[:200].decode(errors="replace").split())
    is_transient = response.status == 429 or response.status >= 500
    message = f"status {response.status}: {text or response.reason}"
    raise TransientError(message, response.status) if is_transient else RemoteError(message)
  return answer


def _read(response: http.client.HTTPResponse, deadline: float) -> bytes:
  """The body of an answer.

  The timeout of the socket is for one read only. A server that sends a byte now and then would
  never exceed it, so the deadline is checked after each read.
  """
  answer = bytearray()
  while part := response.read1(1 << 16):
    answer += part
    if time.monotonic() > deadline:
      raise TimeoutError("timed out in the middle of the answer")
    if len(answer) > _LONGEST_ANSWER:
      raise RemoteError(f"the answer is longer than {_LONGEST_ANSWER} bytes")
  return bytes(answer)


def _scores(answer: bytes, count: int) -> np.ndarray:
  """The scores in an answer, with NaN for null and for numbers that are not finite.

  Raises:
    RemoteError: the answer has another form, or not `count` scores.
  """
  try:
    scores = json.loads(answer)["scores"]
    valid = isinstance(scores, list) and all(
      x is None or isinstance(x, (int, float)) and not isinstance(x, bool) for x in scores
    )
  except (ValueError, KeyError, TypeError):
    valid = False
  if not valid:
    start = answer[:80].decode(errors="replace")
    raise RemoteError(f'the answer is not {{"scores": [number or null]}} but {start!r}')
  if len(scores) != count:
    raise RemoteError(f"{len(scores)} scores for {count} samples")
  numbers = np.array([math.nan if x is None else x for x in scores], np.float64)
  return np.where(np.isfinite(numbers), numbers, np.nan)
