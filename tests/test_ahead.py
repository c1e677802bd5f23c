"""Programs compiled in threads before a run begins, and kept on disk: what is compiled, what is
said, what is found again.
"""

import io
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import pytest
from tiny_checkpoint import ROOT, overrides

from dancegrpo_jax import main
from dancegrpo_jax.compilation import ahead
from dancegrpo_jax.compilation.calls import Call
from dancegrpo_jax.devices import program_cache as cache
from dancegrpo_jax.devices import sharding
from dancegrpo_jax.programs import Programs
from dancegrpo_jax.report.progress import Progress

HIT, MISS = "/jax/compilation_cache/cache_hits", "/jax/compilation_cache/cache_misses"


@pytest.fixture
def events():
  """Names of the events of JAX's compilation cache, as they come."""
  seen = []

  def listen(event: str, **_) -> None:
    seen.append(event)

  jax.monitoring.register_event_listener(listen)
  yield seen
  jax.monitoring.unregister_event_listener(listen)


def test_the_second_start_compiles_nothing(tiny_models, program_cache, tmp_path, events):
  """Counted by JAX's own events: every program of the second run is found."""
  words = overrides(
    tiny_models, iterations=1, evaluation__every=0, logging__compilation_cache=program_cache
  )
  argv = [
    f"--config={ROOT / 'configs' / 'emoji_clip.py'}:tiny",
    *(f"--config.{word}" for word in words),
  ]
  counts = []
  for name in ("first", "second"):
    events.clear()
    assert main.main([*argv, f"--workdir={tmp_path / name}"]) == 0
    counts.append((events.count(HIT), events.count(MISS)))
  assert counts[0][1] >= 14  # the programs of an iteration and of an evaluation
  assert counts[1][0] >= 14 and counts[1][1] == 0


def test_a_damaged_entry_is_compiled_anew(program_cache):
  folder = program_cache / "damaged"
  cache.use(str(folder))

  def compute() -> float:
    return float(jax.jit(lambda x: jnp.sin(x) * 3.25)(2.0))

  first = compute()
  entries = list(folder.rglob("*-cache"))
  for entry in entries:
    entry.write_bytes(b"not a program")
  with pytest.warns(UserWarning, match="persistent compilation cache"):
    assert entries and compute() == first


def test_the_default_folder_is_one_of_a_jaxlib_a_platform_and_a_cpu(
  program_cache, tmp_path, monkeypatch
):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  cache.use("default")
  folder = cache.default_folder("cpu")
  assert (
    jax.config.jax_compilation_cache_dir == str(folder)
    and jax.config.jax_compilation_cache_max_size == 8 * 2**30
  )
  assert (
    folder.is_relative_to(tmp_path)
    and f"jaxlib-{jaxlib.__version__}-cpu-{cache.cpu_kind()}" == folder.name
  )
  assert cache.default_folder("gpu") != folder
  read_text = cache.Path.read_text
  monkeypatch.setattr(
    cache.Path,
    "read_text",
    lambda path: read_text(path).replace(" sse", " sse_of_another_cpu"),
  )
  assert cache.default_folder("cpu") != folder
  cache.use(str(program_cache))
  assert (
    jax.config.jax_compilation_cache_max_size == -1
  )  # a folder of the user's own is not emptied
  cache.use("")
  assert jax.config.jax_compilation_cache_dir is None


class Slow:
  """A program whose compilation lasts as long as the test wants."""

  def __init__(self, gate: threading.Event, error: Exception | None = None):
    self.gate, self.error, self.compiled = gate, error, 0

  def trace(self, *_) -> "Slow":
    return self

  def lower(self) -> "Slow":
    return self

  def compile(self) -> Callable:
    assert self.gate.wait(20)
    self.compiled += 1
    if self.error:
      raise self.error
    return self.trace


def mesh_of_one() -> jax.sharding.Mesh:
  return jax.make_mesh((1, 1, 1), sharding.AXES, devices=jax.devices()[:1])


def test_programs_compile_together_and_those_left_are_named():
  """Two threads: the second program is begun while the first one waits; equal calls are compiled
  once.
  """
  gates, stream, x = (
    [threading.Event() for _ in range(2)],
    io.StringIO(),
    jax.ShapeDtypeStruct((2,), "float32"),
  )
  rollout, decode = Slow(gates[0]), Slow(gates[1])
  listed = [
    Call("decode", decode, (x,), 1),
    Call("rollout", rollout, (x,), 1),
    Call("show decode", decode, (x,), 1),
  ]
  with ThreadPoolExecutor(2) as pool:
    compiling = ahead.start(listed, mesh_of_one(), pool)
    assert list(compiling) == ["rollout", "decode", "show decode"]  # what takes longest comes first
    gates[1].set()
    threading.Timer(7.0, gates[0].set).start()
    begin = time.monotonic()
    with Progress(1, stream=stream, every=5.0):
      compiled = ahead.wait(compiling)
  assert compiled == {"rollout": rollout.trace, "decode": decode.trace, "show decode": decode.trace}
  assert (rollout.compiled, decode.compiled) == (1, 1)
  lines = stream.getvalue().splitlines()
  assert time.monotonic() - begin >= 5 and lines[0].startswith("compiling")
  assert any("rollout" in line and line.endswith(" s") for line in lines[1:])


@pytest.mark.parametrize("reading_fails", [False, True])
def test_an_error_is_told_before_everything_is_compiled(monkeypatch, reading_fails):
  """Of a program, or of what is done meanwhile, as reading weights: what isn't begun by then is
  given up.
  """
  monkeypatch.setattr(ahead, "threads", lambda: 1)
  open_gate, closed, x = threading.Event(), threading.Event(), jax.ShapeDtypeStruct((2,), "float32")
  open_gate.set()
  first = Slow(open_gate, None if reading_fails else ValueError("no such kernel"))
  later = [Slow(closed) for _ in range(3)]
  listed = [
    Call("update accumulate", first, (x,), 1),
    *(Call(f"score {i}", program, (x,), 1) for i, program in enumerate(later)),
  ]
  with pytest.raises(ValueError, match="no such"), ahead.compilers() as pool:
    compiling = ahead.start(listed, mesh_of_one(), pool)
    if reading_fails:
      raise ValueError("no such file")
    ahead.wait(compiling)
  closed.set()
  pool.shutdown(wait=True)
  assert later[-1].compiled == 0 and list(compiling.values())[-1].cancelled()


def test_evaluations_get_programs_of_their_own_shapes():
  names = ("decode", "show decode", "score clip", "show score clip", "features clip", "sample")
  names += ("update deal",)
  jitted, *functions = (lambda: None for _ in range(len(names) + 1))
  compiled = dict(zip(names, functions, strict=True))
  run = Programs(
    encode=jitted,
    rollout=jitted,
    sample=jitted,
    decode=jitted,
    features={"clip": jitted},
    score={"clip": jitted},
    join=jitted,
    advantages=jitted,
    update={"deal": jitted, "step": jitted},
  )
  training, shown = (ahead.put_together(run, compiled, prefix) for prefix in ("", "show "))
  assert (training.decode, shown.decode) == (compiled["decode"], compiled["show decode"])
  assert (training.score["clip"], shown.score["clip"]) == (
    compiled["score clip"],
    compiled["show score clip"],
  )
  assert training.features["clip"] == shown.features["clip"] == compiled["features clip"]
  assert training.sample == shown.sample == compiled[
    "sample"
  ] and training.update == shown.update == {"deal": compiled["update deal"], "step": jitted}


def test_threads_fit_the_memory(monkeypatch):
  monkeypatch.setattr(ahead, "free_memory", lambda: ahead.MEMORY // 2)
  assert ahead.threads() == 1
  monkeypatch.setattr(ahead, "free_memory", lambda: 100 * ahead.MEMORY)
  assert 1 <= ahead.threads() <= 8
  monkeypatch.undo()
  assert np.log2(ahead.free_memory()) > 20
