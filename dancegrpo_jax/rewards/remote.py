"""A reward model behind HTTP, for one that lives in PyTorch or on another machine.
benchmarks/reward_server.py is a server.

A request is a POST of b samples in one of two forms; pixels are 8-bit, `[b, (f,) h, w, 3]`:
  png: application/json, {"images": [base64 of a PNG], "prompts": [text], "metadata": [object or
    null]}
  npz: application/octet-stream, numpy's format with `pixels` and `request`, the bytes of JSON
    {"prompts", "metadata"}
The answer is 200 with JSON {"scores": [number or null]}, b of them; null is a sample that could not
be scored.
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

from dancegrpo_jax.rewards.base import Reward, RewardKind
from dancegrpo_jax.types import Example, Media

FORMATS = ("png", "npz")
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0  # seconds before a retry; doubles each time
_LONGEST_ANSWER = 1 << 24  # bytes


class RemoteError(RuntimeError):
  """A batch that could not be scored: the message says where, why and after how many attempts."""


class _Passing(Exception):
  """A failure that another attempt may not see: no connection, a timeout, a server that says 429 or
  5xx.
  """


def build(
  url: str, timeout: float, retries: int, format: str, pause: Callable[[float], None] = time.sleep
) -> Reward:
  """The term "remote".

  `score` raises RemoteError where the whole batch failed, which the loop reports and turns into
  NaN, as for any host reward; a null, a number that is not finite, and a sample whose pixels are
  not, is NaN alone.

  Args:
    url: http:// or https:// of the scorer.
    timeout: seconds of one attempt, from the connection to the end of the answer.
    retries: attempts after the first.
    format: "png" or "npz".
    pause: sleeps between attempts.

  Raises:
    ValueError: naming a field of config.reward.remote that can't be used.
  """
  address = _address(url)
  for field, value, holds in (
    ("timeout", timeout, timeout > 0),
    ("retries", retries, retries >= 0),
  ):
    if not holds:
      raise ValueError(
        f"config.reward.remote.{field} = {value!r}: must be"
        f" {'above' if field == 'timeout' else 'at least'} 0"
      )
  if format not in FORMATS:
    raise ValueError(
      f"config.reward.remote.format = {format!r}: unknown; one of {', '.join(FORMATS)}"
    )
  encode = {"png": _as_png, "npz": _as_npz}[format]

  def score(media: Media, examples: list[Example]) -> dict[str, np.ndarray]:
    pixels = np.asarray(media.pixels)
    sound = np.isfinite(pixels).reshape(len(pixels), -1).all(axis=1)
    bytes8 = np.round(np.clip(np.nan_to_num(pixels), 0, 1) * 255).astype(np.uint8)
    body, kind = encode(
      bytes8, {"prompts": [e.prompt for e in examples], "metadata": [e.metadata for e in examples]}
    )
    scores = _patiently(
      lambda: _post(address, body, kind, timeout, len(examples)), url, retries, pause
    )
    return {"remote": np.where(sound, scores, np.nan).astype(np.float32)}

  return Reward(name="remote", kind="host", terms=("remote",), score=score)


KIND = RewardKind(build=lambda name, section, files, networks: build(**section), section="remote")


def _address(url: str) -> SplitResult:
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
  from PIL import Image

  if pixels.ndim != 4:
    raise RemoteError(
      f"reward remote: format png sends images, not video {list(pixels.shape)}; use npz"
    )
  images = []
  for image in pixels:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=1)
    images.append(base64.b64encode(buffer.getvalue()).decode())
  return json.dumps({"images": images, **request}).encode(), "application/json"


def _as_npz(pixels: np.ndarray, request: dict[str, Any]) -> tuple[bytes, str]:
  buffer = io.BytesIO()
  np.savez(buffer, pixels=pixels, request=np.frombuffer(json.dumps(request).encode(), np.uint8))
  return buffer.getvalue(), "application/octet-stream"


def _patiently(
  attempt: Callable[[], np.ndarray], url: str, retries: int, pause: Callable[[float], None]
) -> np.ndarray:
  """The first attempt that succeeds. RemoteError: none did, or one failed in a way that won't
  pass.
  """
  for number in range(retries + 1):
    try:
      return attempt()
    except _Passing as error:
      if number == retries:
        raise RemoteError(f"{url}: {error}; attempts: {number + 1}") from error
      pause(min(_FIRST_PAUSE * 2**number, _LONGEST_PAUSE))
    except RemoteError as error:
      raise RemoteError(f"{url}: {error}") from error
  raise AssertionError


def _post(address: SplitResult, body: bytes, kind: str, timeout: float, count: int) -> np.ndarray:
  """One attempt. _Passing or RemoteError."""
  cls = http.client.HTTPSConnection if address.scheme == "https" else http.client.HTTPConnection
  deadline = time.monotonic() + timeout
  connection = cls(address.hostname, address.port, timeout=timeout)
  path = (address.path or "/") + (f"?{address.query}" if address.query else "")
  try:
    connection.request("POST", path, body, {"Content-Type": kind, "Accept": "application/json"})
    connection.sock.settimeout(max(deadline - time.monotonic(), 1e-3))
    response = connection.getresponse()
    answer = _read(response, deadline)
  except (OSError, http.client.HTTPException) as error:
    raise _Passing(
      f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    ) from error
  finally:
    connection.close()
  if response.status != 200:
    text = " ".join(answer[:200].decode(errors="replace").split())
    failure = _Passing if response.status == 429 or response.status >= 500 else RemoteError
    raise failure(f"status {response.status}: {text or response.reason}")
  return _scores(answer, count)


def _read(response: http.client.HTTPResponse, deadline: float) -> bytes:
  """The answer. A socket's timeout is that of one read: a server that trickles would never meet
  it.
  """
  parts, size = [], 0
  while part := response.read1(1 << 16):
    parts.append(part)
    size += len(part)
    if time.monotonic() > deadline:
      raise TimeoutError("timed out in the middle of the answer")
    if size > _LONGEST_ANSWER:
      raise RemoteError(f"the answer is longer than {_LONGEST_ANSWER} bytes")
  return b"".join(parts)


def _scores(answer: bytes, count: int) -> np.ndarray:
  """`count` numbers, NaN for null and for what is not finite. RemoteError: anything else."""
  try:
    scores = json.loads(answer)["scores"]
    good = isinstance(scores, list) and all(
      x is None or isinstance(x, (int, float)) and not isinstance(x, bool) for x in scores
    )
  except (ValueError, KeyError, TypeError):
    good = False
  if not good:
    start = answer[:80].decode(errors="replace")
    raise RemoteError(f'the answer is not {{"scores": [number or null]}} but {start!r}')
  if len(scores) != count:
    raise RemoteError(f"{len(scores)} scores for {count} samples")
  numbers = np.array([math.nan if x is None else x for x in scores], np.float64)
  return np.where(np.isfinite(numbers), numbers, np.nan)
