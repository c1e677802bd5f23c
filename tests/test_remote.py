"""The remote reward against real servers on 127.0.0.1: the reference, and faulty ones."""

import contextlib
import io
import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tiny_checkpoint import toy_pipeline

from dancegrpo_jax import scoring
from dancegrpo_jax.assembly import reward_trial
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.rewards import remote
from dancegrpo_jax.types import Example, Media

ROOT = Path(__file__).parent.parent

SCORERS = """
import time

def brightness(pixels, prompts, metadata):
  assert pixels.dtype == 'float32' and pixels.shape[-1] == 3
  samples = zip(pixels, prompts, metadata)
  return [x.mean() + len(p) + (m or {}).get('bonus', 0) for x, p, m in samples]

def nulls(pixels, prompts, metadata):
  return [None if p == 'bad' else float('nan') if p == 'odd' else 1.0 for p in prompts]

def slow(pixels, prompts, metadata):
  time.sleep(30)

def broken(pixels, prompts, metadata):
  raise RuntimeError('no model')

def short(pixels, prompts, metadata):
  return [1.0]
"""

# A server that answers with the bytes that its argument names. "fails first" answers twice with 503
# and then correctly; "trickles" never ends.
RUDE = """
import http.server, sys, time
kind, seen = sys.argv[1], []
ANSWERS = {
  'garbage': b'<html>welcome</html>',
  'text': b'{"scores": ["1", "2"]}',
  'bools': b'{"scores": [true, false]}',
  'empty': b'',
  'infinite': b'{"scores": [Infinity, 2]}',
  'other': b'[1, 2]',
  'missing': b'{"error": "no"}',
  'good': b'{"scores": [1, 2]}',
  'fails first': b'{"scores": [1, 2]}',
  'trickles': b'',
  'refuses': b'{"error": "who are you?"}',
}
class Handler(http.server.BaseHTTPRequestHandler):
  def do_POST(self):
    self.rfile.read(int(self.headers['Content-Length']))
    seen.append(time.time())
    print('request', flush=True)
    if kind == 'fails first' and len(seen) < 3:
      self.send_response(503)
    else:
      self.send_response(403 if kind == 'refuses' else 200)
    self.end_headers()
    self.wfile.write(ANSWERS[kind])
    for _ in range(100 if kind == 'trickles' else 0):
      self.wfile.write(b' ')
      self.wfile.flush()
      time.sleep(0.1)
  def log_message(self, *_):
    pass
server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
print(f'listening on http://127.0.0.1:{server.server_address[1]}/', flush=True)
server.serve_forever()
"""


@contextlib.contextmanager
def process(*arguments, cwd=None):
  """(url, process) of a server that prints `listening on URL`; it is ended afterwards."""
  child = subprocess.Popen(
    [sys.executable, *arguments],
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    text=True,
    cwd=cwd,
  )
  try:
    line = child.stdout.readline()
    assert line.startswith("listening on "), line
    yield line.split()[-1], child
  finally:
    child.kill()
    child.communicate()


@contextlib.contextmanager
def reference(tmp_path, function):
  (tmp_path / "scorers.py").write_text(SCORERS)
  server = str(ROOT / "benchmarks" / "reward_server.py")
  with process(server, f"scorers:{function}", "--port=0", cwd=tmp_path) as (url, child):
    yield url, child


@contextlib.contextmanager
def rude(kind):
  with process("-c", RUDE, kind) as started:
    yield started


def reward(url, timeout=20.0, retries=0, format="npz", pauses=None):
  return remote.build(
    url, timeout, retries, format, pause=(pauses if pauses is not None else []).append
  )


def ask(reward, prompts=("a", "bb"), pixels=None, metadata=None):
  pixels = (
    np.random.default_rng(0).random((len(prompts), 6, 5, 3), np.float32)
    if pixels is None
    else pixels
  )
  examples = [Example(i, prompt, metadata=metadata) for i, prompt in enumerate(prompts)]
  return reward.score(Media(pixels), examples)["remote"]


@pytest.mark.parametrize("format", remote.FORMATS)
def test_scores_come_back_in_order(tmp_path, format):
  pixels = np.random.default_rng(1).random((3, 8, 6, 3), np.float32)
  pixels[0] += 2  # above the range, and therefore clipped
  with reference(tmp_path, "brightness") as (url, _):
    scorer = reward(url, format=format)
    scores = ask(scorer, ("a", "a cat", "größer 😀"), pixels, {"bonus": 10})
    again = ask(scorer, ("a",), pixels[1:2])
  expected = np.clip(pixels, 0, 1).mean((1, 2, 3)) + np.array([1, 5, 8]) + 10
  assert scores.dtype == np.float32 and scores.shape == (3,)
  np.testing.assert_allclose(scores, expected, atol=2e-3)  # pixels are sent in 8 bits
  np.testing.assert_allclose(again, pixels[1].mean() + 1, atol=2e-3)


def test_video_goes_as_npz(tmp_path):
  video = np.random.default_rng(0).random((2, 3, 6, 5, 3), np.float32)
  with reference(tmp_path, "brightness") as (url, _):
    np.testing.assert_allclose(
      ask(reward(url), pixels=video), video.mean((1, 2, 3, 4)) + [1, 2], atol=2e-3
    )
    with pytest.raises(remote.RemoteError, match="format png sends images, not video.*use npz"):
      ask(reward(url, format="png"), pixels=video)


def test_what_a_request_says(monkeypatch):
  """Clips are sent with their frames a second. The body is taken where it would be sent."""
  sent = []

  def post(address, body, content_type, timeout):
    sent.append(json.loads(np.load(io.BytesIO(body))["request"].tobytes()))
    return b'{"scores": [1, 2]}'

  monkeypatch.setattr(remote, "_post", post)
  examples = [Example(0, "a"), Example(1, "b", metadata={"x": 1})]
  for media in (Media(np.zeros((2, 3, 6, 5, 3)), 12.0), Media(np.zeros((2, 6, 5, 3)))):
    reward("http://127.0.0.1:1/").score(media, examples)
  common = {"prompts": ["a", "b"], "metadata": [None, {"x": 1}]}
  assert sent == [common | {"fps": 12.0}, common]


def test_single_failures_are_nan_alone(tmp_path):
  pixels = np.full((4, 4, 4, 3), 0.5, np.float32)
  # The generator failed here, so there is no score, whatever the server answers.
  pixels[3, 0, 0, 0] = np.nan
  with reference(tmp_path, "nulls") as (url, _):
    scores = ask(reward(url), ("good", "bad", "odd", "good"), pixels)
  np.testing.assert_array_equal(scores, np.array([1, np.nan, np.nan, np.nan], np.float32))


def test_a_failed_batch_is_nan_in_the_loop_and_said_once(tmp_path):
  said = []
  with reference(tmp_path, "broken") as (url, _):
    pixels, examples = np.zeros((3, 4, 4, 3), np.float32), [Example(i, "x") for i in range(3)]
    scores = scoring.host_scores(reward(url), Media(pixels), examples, said.append)
  assert (
    list(scores) == ["remote"]
    and np.isnan(scores["remote"]).all()
    and scores["remote"].shape == (3,)
  )
  (line,) = said
  assert (
    "reward remote failed for 3 samples" in line
    and url in line
    and "status 500" in line
    and "no model" in line
  )


def test_an_error_of_the_server_is_tried_again(tmp_path):
  pauses = []
  with (
    reference(tmp_path, "broken") as (url, _),
    pytest.raises(remote.RemoteError, match="status 500: .*no model.*attempts: 4"),
  ):
    ask(reward(url, retries=3, pauses=pauses))
  assert pauses == [0.5, 1.0, 2.0]


def test_a_retry_can_succeed():
  pauses = []
  with rude("fails first") as (url, _):
    np.testing.assert_array_equal(ask(reward(url, retries=2, pauses=pauses)), [1, 2])
  assert pauses == [0.5, 1.0]


@pytest.mark.parametrize(
  "server", [lambda path: reference(path, "slow"), lambda path: rude("trickles")]
)
def test_a_slow_server_times_out(tmp_path, server):
  """One server does not answer, and one sends single bytes forever."""
  with server(tmp_path) as (url, _):
    start = time.monotonic()
    with pytest.raises(remote.RemoteError, match="timed out.*attempts: 2"):
      ask(reward(url, timeout=0.6, retries=1))
    assert 1.2 <= time.monotonic() - start < 5


def test_a_server_that_is_not_there():
  with socket.socket() as held:
    held.bind(("127.0.0.1", 0))  # the port is taken, but nothing listens
    with pytest.raises(
      remote.RemoteError, match="http://127.0.0.1:.*ConnectionRefusedError.*attempts: 3"
    ):
      ask(reward(f"http://127.0.0.1:{held.getsockname()[1]}/", retries=2))


@pytest.mark.parametrize(
  "function, words",
  [
    ("broken", "RemoteError: .*status 500: .*no model"),
    ("short", "RemoteError: .*: 1 scores for 2 samples"),
  ],
)
def test_the_trial_before_a_run_tells_a_mistake(tmp_path, function, words):
  examples, pipeline = [Example(0, "a"), Example(1, "b")], toy_pipeline()
  with (
    reference(tmp_path, function) as (url, _),
    pytest.raises(ConfigError, match=f"config.reward: 'remote', .*{words}"),
  ):
    reward_trial.require_usable({"remote": reward(url)}, pipeline, examples)


def test_the_trial_before_a_run_passes_a_server_that_scores(tmp_path):
  said = []
  with reference(tmp_path, "nulls") as (url, _):
    reward_trial.require_usable(
      {"remote": reward(url)}, toy_pipeline(), [Example(0, "a"), Example(1, "bad")], said.append
    )
  with rude("fails first") as (url, _):  # 503, as a server that is still loading
    reward_trial.require_usable(
      {"remote": reward(url)}, toy_pipeline(), [Example(0, "a"), Example(1, "b")], said.append
    )
  (line,) = said
  assert line.startswith("reward remote isn't ready yet: ServerDownError: ") and "503" in line


def test_a_server_that_dies(tmp_path):
  with reference(tmp_path, "brightness") as (url, child):
    scorer = reward(url)
    assert np.isfinite(ask(scorer)).all()
    child.kill()
    child.wait()
    with pytest.raises(remote.RemoteError, match="attempts: 1"):
      ask(scorer)


@pytest.mark.parametrize("kind", ["garbage", "text", "bools", "empty", "other", "missing"])
def test_a_malformed_answer(kind):
  """The answer would be the same again, so that there is no retry."""
  pauses = []
  with rude(kind) as (url, _), pytest.raises(remote.RemoteError, match="the answer is not"):
    ask(reward(url, retries=3, pauses=pauses))
  assert not pauses


def test_a_refusal_is_final():
  pauses = []
  with (
    rude("refuses") as (url, _),
    pytest.raises(remote.RemoteError, match="status 403: .*who are you"),
  ):
    ask(reward(url, retries=3, pauses=pauses))
  assert not pauses


def test_a_number_that_is_not_finite_failed():
  with rude("infinite") as (url, _):
    np.testing.assert_array_equal(ask(reward(url)), np.array([np.nan, 2], np.float32))


def test_too_few_scores(tmp_path):
  with (
    reference(tmp_path, "short") as (url, _),
    pytest.raises(remote.RemoteError, match="1 scores for 2 samples"),
  ):
    ask(reward(url))


@pytest.mark.parametrize(
  "change, message",
  [
    ({"url": "127.0.0.1:8000"}, "config.reward.remote.url = '127.0.0.1:8000': must be http://HOST"),
    ({"url": "ftp://host/"}, "config.reward.remote.url"),
    ({"url": "http://host:port/"}, "config.reward.remote.url"),
    ({"timeout": 0.0}, "config.reward.remote.timeout = 0.0: must be above 0"),
    ({"retries": -1}, "config.reward.remote.retries = -1: must be at least 0"),
    ({"format": "jpeg"}, "config.reward.remote.format = 'jpeg': unknown; one of png, npz"),
  ],
)
def test_a_mistake_in_the_section_is_named(change, message):
  with pytest.raises(ValueError, match=message):
    remote.build(
      **{"url": "http://127.0.0.1:1/", "timeout": 1.0, "retries": 0, "format": "png"} | change
    )
