"""Whole runs on the tiny model, through the command: metrics, files, compilations, resuming,
chunks, rewards that fail.

Every run is `main` in this process, on 8 devices. The first one compiles; the others find most
programs in its compilation cache.
"""

import functools
import html
import io
import json
import os
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_checkpoint import (
  ROOT,
  assert_trees_equal,
  moves_between_devices,
  overrides,
  shapes_of,
  tiny_config,
)

from dancegrpo_jax import main, programs
from dancegrpo_jax.checkpoints import store
from dancegrpo_jax.compilation import ahead
from dancegrpo_jax.data import prompts
from dancegrpo_jax.devices import sharding
from dancegrpo_jax.report import metrics
from dancegrpo_jax.report.clock import Clock
from dancegrpo_jax.report.progress import Progress
from dancegrpo_jax.rl import lanes
from dancegrpo_jax.settings import stored_config
from dancegrpo_jax.training import outcome, tracing
from dancegrpo_jax.training.collecting import collect
from dancegrpo_jax.training.session import iterations_done, prepare

ITERATIONS, PROMPTS, GROUP, CHUNK = 4, 4, 8, 8
SAMPLES, RATE, CLIP_RANGE = PROMPTS * GROUP, 2e-4, 1e-3
METRICS = {  # what every iteration must say, at least
  "reward/mean",
  "reward/std",
  "reward/min",
  "reward/max",
  "reward/failed",
  "group/std_mean",
  "group/zero_variance",
  "advantage/abs_mean",
  "ratio/mean",
  "ratio/min",
  "ratio/max",
  "ratio/drift_max",
  "clip_fraction",
  "approx_kl",
  "grad_norm",
  "learning_rate",
  "time/encode",
  "time/rollout",
  "time/decode",
  "time/reward",
  "time/update",
  "samples_per_second",
}
PROGRAMS = ("encode", "rollout", "sample", "decode", "advantages")  # and those of the update


class Call(NamedTuple):
  """A call of a program: its name, how many programs had been compiled before it, and the shapes of
  the arguments of the update's.
  """

  name: str
  compilations: int
  arguments: Any


class Run(NamedTuple):
  """What a run did."""

  workdir: Path
  code: Any  # exit code, or the exception that came out
  seconds: float
  rows: list
  calls: list[Call]
  programs: programs.Programs | None  # jitted, as they were before they were compiled


COMPILATIONS = []


@pytest.fixture(scope="module")
def compilations():
  """Counts every program that JAX compiles or finds in its cache, into `COMPILATIONS`."""

  def listen(event: str, seconds: float, **_) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
      COMPILATIONS.append(event)

  jax.monitoring.register_event_duration_secs_listener(listen)
  yield
  jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="module")
def flags(tiny_models, program_cache, compilations):
  """`(**changes) -> argv`: everything that a state can hold is on (average, warm-up, per-prompt
  statistics).
  """
  settings = {
    "iterations": ITERATIONS,
    "data__prompts_per_iteration": PROMPTS,
    "rollout__samples_per_prompt": GROUP,
    "rollout__chunk": CHUNK,
    "optimizer__updates_per_iteration": 2,
    "optimizer__warmup_steps": 3,
    "optimizer__weight_decay": 0.0,
    "ema__decay": 0.9,
    "advantage__history__size": 32,
    "advantage__history__min_count": 16,
    "checkpoint__every": 2,
    "checkpoint__keep": 3,
    "evaluation__every": 2,
    "logging__compilation_cache": program_cache,
    "reward__terms": (("clip", 1.0), ("compressibility", 0.5)),
    "reward__combine": "rewards",
    "optimizer__learning_rate": RATE,
    "objective__clip_range": CLIP_RANGE,
  }

  def argv(**changes) -> list[str]:
    words = overrides(tiny_models, **settings | changes)
    return [
      f"--config={ROOT / 'configs' / 'emoji_clip.py'}:tiny",
      *(f"--config.{word}" for word in words),
    ]

  return argv


def execute(argv: list[str], workdir: Path) -> Run:
  """Runs the command in this process and watches the calls of its programs."""
  calls, built, build, put_together = [], [], programs.build, ahead.put_together

  def kept(*args, **kwargs):
    built.append(build(*args, **kwargs))
    return built[-1]

  def watched(*args, **kwargs):
    compiled = put_together(*args, **kwargs)

    def watch(name, function):
      def call(*arguments):
        shapes = shapes_of(arguments) if name.startswith("update ") else None
        calls.append(Call(name, len(COMPILATIONS), shapes))
        return function(*arguments)

      return call

    update = {name: watch(f"update {name}", each) for name, each in compiled.update.items()}
    plain = {name: watch(name, getattr(compiled, name)) for name in PROGRAMS}
    return compiled._replace(**plain, update=update)

  start = time.monotonic()
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(programs, "build", kept)
    patch.setattr(ahead, "put_together", watched)
    try:
      code = main.main([*argv, f"--workdir={workdir}"])
    except Exception as error:  # a defect: the test that is about it shows it, the others go on
      code = error
  return Run(
    workdir,
    code,
    time.monotonic() - start,
    metrics.read(workdir),
    calls,
    built[0] if built else None,
  )


def arguments_of(run: Run, name: str) -> tuple:
  """Shapes of what a program of the update was first called with."""
  return next(call.arguments for call in run.calls if call.name == name)


def updates(run: Run) -> int:
  """How many iterations were finished."""
  return [call.name for call in run.calls].count("update summary")


@pytest.fixture(scope="module")
def straight(flags, tmp_path_factory) -> Run:
  """All iterations in one go."""
  return execute(flags(logging__tensorboard=True), tmp_path_factory.mktemp("straight") / "run")


@pytest.fixture(scope="module")
def halves(straight, flags, tmp_path_factory) -> tuple[Run, Run]:
  """The same run, stopped after half of its iterations and resumed."""
  workdir = tmp_path_factory.mktemp("halves") / "run"
  first = execute(flags(iterations=ITERATIONS // 2), workdir)
  return first, execute(flags(), workdir)


# What a run leaves behind.


def test_metrics_of_every_iteration(straight):
  assert straight.code == 0
  assert [row["iteration"] for row in straight.rows] == list(range(ITERATIONS))
  for row in straight.rows:
    assert set(row) >= METRICS
    assert all(np.isfinite(value) for value in row.values()), row
    zero = (
      "ratio/drift_max",
      "reward/clip/failed",
      "reward/compressibility/failed",
      "reward/failed",
      "optimizer/skipped_total",
    )
    assert {name: row[name] for name in zero} == dict.fromkeys(zero, 0)
    assert (
      0 < row["ratio/rollout_drift_max"] <= 3e-6
    )  # the rollout's own log-probs, in float32 on a CPU: not exact
    assert row["reward/min"] <= row["reward/mean"] <= row["reward/max"] and row["reward/std"] > 0
    assert row["grad_norm"] > 0 and row["group/std_mean"] > 0
    total = row["reward/clip/mean"] + 0.5 * row["reward/compressibility/mean"]
    np.testing.assert_allclose(row["reward/mean"], total, rtol=1e-5)
  # 2 optimizer steps an iteration, warm-up over 3 of them: the rate of an iteration's first step
  np.testing.assert_allclose(
    [row["learning_rate"] * 3 / RATE for row in straight.rows], [1, 3, 3, 3], rtol=1e-6
  )


def test_held_out_prompts_are_scored_on_the_way(straight):
  """After every second iteration: fixed training prompts, held-out ones, and what the first are
  ahead.
  """
  for done in range(1, ITERATIONS + 1):
    row, folder = straight.rows[done - 1], straight.workdir / "samples" / f"iteration_{done:06d}"
    assert ("evaluation/score" in row) == folder.is_dir() == (done % 2 == 0)
    if folder.is_dir():
      stored = json.loads((folder / "prompts.json").read_text())
      assert len(stored["scores"]) == len(stored["held_out"]) == 2  # evaluation.prompts
      np.testing.assert_allclose(row["evaluation/score"], np.mean(stored["scores"]), rtol=1e-5)
      np.testing.assert_allclose(row["evaluation/held_out"], np.mean(stored["held_out"]), rtol=1e-5)
      np.testing.assert_allclose(
        row["evaluation/gap"], row["evaluation/score"] - row["evaluation/held_out"], atol=1e-6
      )


def test_times_add_up_to_no_more_than_the_clock_on_the_wall(straight):
  for row in straight.rows:
    parts = sum(
      value for key, value in row.items() if key.startswith("time/") and key != "time/total"
    )
    np.testing.assert_allclose(parts, row["time/total"], rtol=1e-6)
    np.testing.assert_allclose(row["samples_per_second"] * row["time/total"], SAMPLES, rtol=1e-6)
  assert sum(row["time/total"] for row in straight.rows) <= straight.seconds


def test_an_iteration_is_not_charged_for_the_update_before_it():
  """The loop dispatches ahead: an iteration begins while the last one's update still runs, whose
  time is that one's alone.
  """
  slow = SimpleNamespace(block_until_ready=lambda: time.sleep(0.3))
  with ThreadPoolExecutor(1) as pool:
    begin, clocks = time.monotonic(), []
    for _ in range(2):
      clocks.append(Clock(pool, clocks[-1] if clocks else None))
      clocks[-1].phase("update", slow)
    total = sum(clock.read()["time/total"] for clock in clocks)
    assert total <= time.monotonic() - begin + 0.1


def test_files_of_a_workdir(straight, halves):
  names = {path.name for path in straight.workdir.iterdir()}
  assert names >= {
    "config.json",
    "metrics.jsonl",
    "checkpoints",
    "samples",
    "tensorboard",
    "report.html",
    "status.json",
  }
  assert store.steps(straight.workdir / "checkpoints") == [2, 4]
  assert {path.name for path in (straight.workdir / "samples").iterdir()} == {
    "iteration_000000",
    "iteration_000002",
    "iteration_000004",
    "extremes_000001",  # with which later samples are compared
    "extremes_000002",
    "extremes_000004",
  }
  assert (
    len(list((straight.workdir / "samples" / "iteration_000000").glob("*.png"))) == 2
  )  # evaluation.prompts
  assert json.loads((straight.workdir / "config.json").read_text())["iterations"] == ITERATIONS
  assert list((straight.workdir / "tensorboard").glob("*tfevents*"))
  page = (straight.workdir / "report.html").read_text()
  assert "data:image/png;base64" in page and "<svg" in page
  assert f"Finished after {ITERATIONS} of {ITERATIONS} iterations" in page
  assert "Distribution of the reward" in page and "Diversity" in page
  kept = json.loads((straight.workdir / "samples/extremes_000004/scores.json").read_text())
  assert np.mean(kept["rewards"]) == pytest.approx(straight.rows[-1]["reward/mean"], abs=1e-4)
  temporary = re.compile(r"\.tmp$|\.partial$|orbax-checkpoint-tmp")
  for run in (straight, *halves):
    assert not [path for path in run.workdir.rglob("*") if temporary.search(path.name)]


def test_compilation_cache_fills(straight, program_cache):
  assert straight.code == 0 and list(program_cache.iterdir())


# Compilations.


def test_every_program_is_compiled_before_the_first_iteration(straight):
  """The loop calls compiled programs: the jitted ones are never called, and nothing at all is
  compiled after two iterations.
  """
  jitted = jax.tree.leaves(straight.programs._asdict())
  assert len(jitted) == 8 + 6 and all(function._cache_size() == 0 for function in jitted)
  ends = [call.compilations for call in straight.calls if call.name == "update deal"]
  assert len(ends) == ITERATIONS
  later = {
    call.compilations
    for call in straight.calls
    if call.name != "sample" and call.compilations > ends[1]
  }
  assert not later


def test_no_device_fetches_trajectories(straight):
  """Of the real UNet's update: nothing as large as a sample's latents moves between devices, only
  sums of gradients.
  """
  state = arguments_of(straight, "update step")[0]
  with jax.set_mesh(state.step.sharding.mesh):
    texts = {
      name: program.lower(*arguments_of(straight, f"update {name}")).compile().as_text()
      for name, program in straight.programs.update.items()
    }
  assert "all-reduce" in texts["accumulate"]
  for name, text in texts.items():
    assert not [move for move in moves_between_devices(text) if np.prod(move) >= 8 * 8 * 4], name


# Resuming.


def stored(run: Run, iteration: int) -> dict:
  """Every field of a checkpoint, on the host."""
  state = arguments_of(run, "update step")[0]
  return jax.device_get(
    store.restore(run.workdir / "checkpoints", state, iteration).state._asdict()
  )


def test_resumed_equals_straight_bit_for_bit(straight, halves):
  assert [run.code for run in halves] == [0, 0]
  assert updates(halves[1]) == ITERATIONS // 2
  expected = assert_same_bits(halves[1], straight)
  assert all(
    jax.tree.leaves(expected[field]) for field in ("trainable", "opt_state", "ema", "prompt_stats")
  )
  assert expected["step"] == 2 * ITERATIONS
  before = jax.tree.leaves(stored(straight, ITERATIONS // 2)["trainable"])
  assert all((a != b).any() for a, b in zip(before, jax.tree.leaves(expected["trainable"])))
  (stats,) = expected["prompt_stats"].values()
  # Rewards of every iteration.
  assert stats.count.sum() == ITERATIONS * SAMPLES and (stats.values != 0).any()


def assert_same_bits(run: Run, straight: Run) -> dict:
  """Asserts that the last checkpoint and all metrics but times are equal; returns its fields."""
  actual, expected = stored(run, ITERATIONS), stored(straight, ITERATIONS)
  assert_trees_equal(actual, expected)
  timed = ("time/", "samples_per_second")
  rows = [
    [{k: v for k, v in row.items() if not k.startswith(timed)} for row in each.rows]
    for each in (run, straight)
  ]
  assert rows[0] == rows[1]
  return expected


def test_resumed_with_calls_of_another_length(straight, flags, tmp_path, capsys):
  """Each iteration has 2 optimizer steps of 3 microbatches, and a pass before over 3 of them."""
  field, workdir = "optimizer__microbatches_per_call", tmp_path / "run"
  first = execute(flags(iterations=ITERATIONS // 2, **{field: 1}), workdir)
  capsys.readouterr()
  second = execute(flags(**{field: 2}), workdir)
  assert (first.code, second.code) == (0, 0)
  assert "resuming with config.optimizer.microbatches_per_call: 1 -> 2" in capsys.readouterr().out
  # By hand: calls of "accumulate" and of "remember" in an iteration.
  for run, accumulate, remember in ((straight, 2, 1), (first, 6, 3), (second, 4, 2)):
    names = [call.name for call in run.calls]
    assert names.count("update accumulate") == updates(run) * accumulate
    assert names.count("update remember") == updates(run) * remember
  assert_same_bits(second, straight)


def test_cached_embeddings_change_nothing(straight, flags, tmp_path):
  """Trained from a cache, without a text encoder in memory: the same bits as by the encoder in the
  loop.
  """
  run = execute(flags(data__cache_embeddings=True), tmp_path / "run")
  assert run.code == 0 and "encode" in {call.name for call in straight.calls} - {
    call.name for call in run.calls
  }
  frozen = [set(arguments_of(r, "update accumulate")[1]) for r in (run, straight)]
  assert frozen == [{"decoder"}, {"decoder", "text_encoder"}]
  jax.tree.map(np.testing.assert_array_equal, stored(run, ITERATIONS), stored(straight, ITERATIONS))
  for ours, theirs in zip(run.rows, straight.rows, strict=True):
    computed = [
      key for key in theirs if not key.startswith(("time/", "samples_per_second", "evaluation/"))
    ]
    assert [ours[key] for key in computed] == [theirs[key] for key in computed]
    shown = [
      key for key in theirs if key.startswith("evaluation/")
    ]  # encoded in batches of another size
    np.testing.assert_allclose(
      [ours[key] for key in shown], [theirs[key] for key in shown], atol=1e-5
    )


def snapshot(folder: Path) -> dict:
  return {
    path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
  }


def test_a_finished_run_says_so_and_changes_nothing(straight, flags, capsys):
  before = snapshot(straight.workdir)
  again = execute(flags(logging__tensorboard=True), straight.workdir)
  assert again.code == 0 and not again.calls
  assert "finished" in capsys.readouterr().out
  assert snapshot(straight.workdir) == before


def test_a_changed_field_is_refused_by_name(straight, flags, capsys):
  before = snapshot(straight.workdir)
  argv = flags(
    objective__clip_range=0.5, optimizer__learning_rate=1e-3, iterations=9, rollout__chunk=16
  )
  refused, errors = execute(argv, straight.workdir), capsys.readouterr().err
  assert refused.code == 2 and not refused.calls
  assert f"config.objective.clip_range: {CLIP_RANGE} -> 0.5" in errors
  assert f"config.optimizer.learning_rate: {RATE} -> 0.001" in errors
  assert "iterations" not in errors and "chunk" not in errors  # these may change
  assert all(line.startswith("error: ") for line in errors.splitlines())
  assert snapshot(straight.workdir) == before


def test_iterations_may_grow(straight, flags, capsys):
  """As in `halves`, from 2 to 4; here only what is said about it."""
  config = json.loads((straight.workdir / "config.json").read_text())
  changed = stored_config.from_json(json.dumps(config | {"iterations": 9}))
  assert iterations_done(changed, straight.workdir) == ITERATIONS
  assert f"config.iterations: {ITERATIONS} -> 9" in capsys.readouterr().out


# Chunks.


def test_deal_is_the_same_samples_to_each_lane():
  chunks = lanes.deal(24, 8, 4)
  assert chunks.tolist() == [
    [0, 1, 6, 7, 12, 13, 18, 19],
    [2, 3, 8, 9, 14, 15, 20, 21],
    [4, 5, 10, 11, 16, 17, 22, 23],
  ]
  np.testing.assert_array_equal(lanes.deal(24, 24, 4)[0], np.arange(24))


@pytest.fixture(scope="module")
def collected(tiny_models, program_cache, tmp_path_factory):
  """The first iteration's samples and scores, in chunks of 32 (all) and of 8, half a group of
  16.
  """
  results = {}
  for chunk in (32, 8):
    changes = {
      "data__prompts_per_iteration": 2,
      "rollout__samples_per_prompt": 16,
      "rollout__chunk": chunk,
    }
    config = tiny_config(tiny_models, **changes, logging__compilation_cache=program_cache)
    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh), ThreadPoolExecutor(1) as pool:
      examples = prompts.read_examples(config)
      session, state = prepare(
        config,
        tmp_path_factory.mktemp("chunks"),
        examples,
        mesh,
        0,
        Progress(1, stream=io.StringIO()),
      )
      seen = collect(session, state.trainable, 0, Clock(pool), pool, print, keep_pixels=True)
      assert len(seen.rollouts) == 32 // chunk
      order = np.argsort(lanes.deal(32, chunk, config.mesh.lanes).reshape(-1))
      latents = np.concatenate([rollout.latents for rollout in seen.rollouts], 1)[:, order]
      results[chunk] = latents, np.asarray(seen.scores["clip"]), seen.media.pixels
      # The iteration is given up before the last chunk.
      answers = [*[False] * (32 // chunk - 1), True]
      stop = functools.partial(answers.pop, 0)
      clock = Clock(pool)
      assert collect(session, state.trainable, 0, clock, pool, print, stop=stop) is None
      assert answers == []
  return results


def test_chunks_change_no_reward(collected):
  (whole, scores, _), (parts, scores_of_parts, _) = collected[32], collected[8]
  np.testing.assert_array_equal(parts[0], whole[0])  # the initial noise, bit for bit
  np.testing.assert_allclose(parts, whole, atol=1e-4 * np.abs(whole).max())
  assert scores.shape == (2, 16) and scores.std(1).min() > 1e-3
  np.testing.assert_allclose(scores_of_parts, scores, atol=1e-5)


def test_a_group_may_be_larger_than_a_chunk(collected):
  """The best and the worst sample of the first group are shown: its pixels are kept, in however
  many chunks they came.
  """
  np.testing.assert_allclose(collected[8][2], collected[32][2], atol=1e-4)


# Rewards on the host.

REWARD = '''
import threading
import numpy as np
calls, lock = [], threading.Lock()

def score(pixels, prompts, metadata):
  """By iteration: constant; one sample of each chunk fails; an exception."""
  with lock:
    calls.append((pixels, prompts, metadata))
    # The first calls are the trial and the report's fixed prompts.
    iteration = (len(calls) - 3) // CHUNKS
  if iteration < 1:
    return [0.3] * len(prompts)
  if iteration == 1:
    return [float("nan") if i == 3 else float(image.mean()) for i, image in enumerate(pixels)]
  raise ConnectionError("the scorer is down")
'''.replace("CHUNKS", str(SAMPLES // CHUNK))


@pytest.fixture(scope="module")
def host(straight, flags, tmp_path_factory):
  """A run on a reward of the user's own, which at first cannot tell samples apart, then fails in
  part, then for good.
  """
  folder = tmp_path_factory.mktemp("host")
  (folder / "scorer_of_a_run.py").write_text(REWARD)
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(folder)
    streams = {name: io.StringIO() for name in ("stdout", "stderr")}
    for name, stream in streams.items():
      patch.setattr(f"sys.{name}", stream)
    terms = (("scorer_of_a_run:score", 1.0),)
    changes = {
      "iterations": 6,
      "checkpoint__every": 1,
      "evaluation__every": 0,
      "logging__profile_steps": (2, 5),
    }
    run = execute(flags(reward__terms=terms, **changes), folder / "run")
    import scorer_of_a_run

    return run, scorer_of_a_run.calls, streams["stdout"].getvalue(), streams["stderr"].getvalue()


def test_a_reward_of_ones_own_gets_pixels_prompts_and_metadata(host):
  run, calls, _, _ = host
  for pixels, texts, metadata in calls:
    assert (
      isinstance(pixels, np.ndarray)
      and pixels.shape == (len(texts), 32, 32, 3)
      and pixels.dtype == np.float32
    )
    assert pixels.min() >= 0 and pixels.max() <= 1
    assert all(isinstance(text, str) for text in texts) and metadata == [None] * len(texts)
  assert [len(texts) for _, texts, _ in calls[:-1]] == [
    2,
    4,
    *[CHUNK] * (len(calls) - 3),
  ]  # first the trial and the 2 + 2 fixed prompts
  for _, texts, _ in calls[
    2 : 2 + SAMPLES // CHUNK
  ]:  # a chunk takes a sample from each of 8 lanes, two of which are a group
    assert len(set(texts)) == PROMPTS and texts[::2] == texts[1::2]
  second = calls[2 + SAMPLES // CHUNK : 2 + 2 * SAMPLES // CHUNK]
  kept = np.concatenate([np.delete(pixels.mean((1, 2, 3)), 3) for pixels, _, _ in second])
  for name in ("mean", "min", "max"):
    np.testing.assert_allclose(run.rows[1][f"reward/{name}"], getattr(kept, name)(), rtol=1e-5)


def test_constant_rewards_leave_the_policy_alone(host):
  """...so that the second optimizer step's ratio compares the recomputed old log-probs with the
  training pass, on the UNet.
  """
  row = host[0].rows[0]
  assert (
    row["group/zero_variance"] == 1 and row["advantage/abs_mean"] == 0 and row["grad_norm"] == 0
  )
  assert row["ratio/drift_max"] == 0
  assert abs(row["ratio/min"] - 1) <= 3e-6 and abs(row["ratio/max"] - 1) <= 3e-6


def test_some_failed_rewards_do_not_stop_a_run(host):
  row = host[0].rows[1]
  np.testing.assert_allclose(row["reward/failed"], 1 / CHUNK)
  assert row["grad_norm"] > 0 and np.isfinite(list(row.values())).all()


def test_too_many_failed_rewards_do(host):
  run, _, output, errors = host
  assert run.code == 2 and [row["reward/failed"] for row in run.rows[2:]] == [1, 1, 1]
  assert "ConnectionError: the scorer is down (" in output and "scorer_of_a_run.py:16)" in output
  file = run.workdir / "reward_errors.txt"
  assert f"traceback: {file}" in output and "the scorer is down" in file.read_text()
  (line,) = errors.splitlines()
  assert line.startswith("error: ") and "reward.max_failed = 0.5" in line
  assert "each of the last 3 iterations (reward.failed_iterations = 3)" in line
  assert store.latest(run.workdir / "checkpoints") == 4  # before the iteration that ended the run
  assert re.search(r"last good checkpoint is that of iteration 4\b", line), line


def test_the_report_of_a_failed_run_says_what_the_command_said(host):
  run, _, _, errors = host
  page = html.unescape((run.workdir / "report.html").read_text())
  assert "Ended by an error after 5 of 6 iterations" in page
  assert errors.removeprefix("error: ").strip() in page
  assert "ConnectionError: the scorer is down" in page


def test_rewards_without_a_spread_are_said_once(host):
  (line,) = [line for line in host[2].splitlines() if "no group had a spread" in line]
  assert line.startswith("note: in iteration 1 ") and "scorer_of_a_run:score" in line


def test_failed_rewards_are_no_number(host):
  """All of them failed, so there is no mean: null in metrics.jsonl, not 0."""
  row = host[0].rows[2]
  assert all(np.isnan(row[f"reward/{name}"]) for name in ("min", "max"))
  assert np.isnan(row["reward/mean"])


def test_the_profiler_is_never_left_on(host):
  """Its window is longer than the run: the trace ends with the run, and is on disk."""
  try:
    jax.profiler.stop_trace()
  except RuntimeError:  # nothing to stop
    assert [path for path in (host[0].workdir / "profile").rglob("*") if path.is_file()]
  else:
    pytest.fail("the trace was still running")


def test_resuming_inside_the_profiler_s_window():
  """The first iteration of the window is past, so no trace was started: nothing to stop, and no
  reason to crash.
  """
  tracing.stop_profile(tiny_config(logging__profile_steps=(1, 2)), 2, None)


SIGNAL = f"""
import os, signal, threading
calls, lock = [], threading.Lock()

def score(pixels, prompts, metadata):
  with lock:
    calls.append(prompts)
    # The first calls are the trial and the report's fixed prompts.
    if len(calls) == {2 + 2 * SAMPLES // CHUNK + 1}:
      os.kill(os.getpid(), signal.SIGTERM)
  return pixels.mean((1, 2, 3))
"""


def test_sigterm_in_a_rollout_gives_the_iteration_up_and_saves_the_last(
  straight, flags, tmp_path, monkeypatch, capsys
):
  """It comes with the first scores of the third iteration, whose update, minutes long elsewhere,
  isn't waited for.
  """
  (tmp_path / "scorer_that_ends.py").write_text(SIGNAL)
  monkeypatch.syspath_prepend(tmp_path)
  changes = {
    "reward__terms": (("scorer_that_ends:score", 1.0),),
    "checkpoint__every": 100,
    "evaluation__every": 0,
  }
  run = execute(flags(**changes), tmp_path / "run")
  assert run.code == 0 and "stopped by SIGTERM: 2 iterations are saved" in capsys.readouterr().out
  assert store.latest(run.workdir / "checkpoints") == 2 and [
    row["iteration"] for row in run.rows
  ] == [0, 1]
  assert updates(run) == [call.name for call in run.calls].count("update deal") == 2
  page = (run.workdir / "report.html").read_text()
  assert "Stopped after 2 of 4 iterations" in page and "stopped by SIGTERM: 2 iterations" in page
  again = execute(flags(**changes, iterations=3), tmp_path / "run")
  assert again.code == 0 and [row["iteration"] for row in again.rows] == [0, 1, 2]
  assert "Finished after 3 of 3 iterations" in (run.workdir / "report.html").read_text()
  assert updates(again) == 1


def test_sigterm_while_the_devices_finish_a_rollout_comes_before_the_update(
  straight, flags, tmp_path, monkeypatch, capsys
):
  """All of the third iteration's chunks are queued by then, and nothing on the host waits for them
  but the question itself.
  """
  put_together, times = ahead.put_together, []

  def signalled(scores):
    times.append(None)
    if len(times) == 3:
      time.sleep(1)  # as long chunks would take: the host has come to its question meanwhile
      os.kill(os.getpid(), signal.SIGTERM)
    return scores

  def slow(*args, **kwargs):
    compiled = put_together(*args, **kwargs)

    def join(scores, order):
      joined = compiled.join(scores, order)
      queued = jax.jit(
        lambda x: jax.pure_callback(signalled, x, x), out_shardings=joined["clip"].sharding
      )
      return joined | {"clip": queued(joined["clip"])}

    return compiled._replace(join=join)

  monkeypatch.setattr(ahead, "put_together", slow)
  run = execute(
    flags(reward__terms=(("clip", 1.0),), checkpoint__every=100, evaluation__every=0),
    tmp_path / "run",
  )
  assert run.code == 0 and "stopped by SIGTERM: 2 iterations are saved" in capsys.readouterr().out
  assert len(times) == 3 and updates(run) == 2
  assert [call.name for call in run.calls].count("update deal") == 2


def test_a_flat_iteration_is_said_again_after_another(tmp_path):
  config, stream = tiny_config(), io.StringIO()
  values = {"reward/mean": 0.5, "optimizer/skipped_total": 0.0}
  progress = Progress(9, stream=stream)
  with metrics.Writer(tmp_path, config) as writer, ThreadPoolExecutor(1) as pool:
    clock = Clock(pool)
    clock.phase("update", jnp.zeros(()))
    numbers = outcome.Numbers(config, tmp_path, writer, progress)
    # The last iteration has failed as a whole, which is something else.
    shares = [(1.0, 0.0), (1.0, 0.0), (0.75, 0.0), (1.0, 0.25), (1.0, 0.0), (0.5, 0.0), (1.0, 1.0)]
    for iteration, (flat, failed) in enumerate(shares):
      row = values | {"group/zero_variance": flat, "reward/failed": failed}
      numbers.add(outcome.Pending(iteration, row, clock))
      numbers.read()
  said = [line for line in stream.getvalue().splitlines() if line.startswith("note: ")]
  assert [line.split()[3] for line in said] == ["1", "4"]
  assert all("clip" in line and "advantage.min_spread = 1e-06" in line for line in said)


def test_too_many_skipped_steps_stop_a_run(tmp_path):
  config = tiny_config(optimizer__max_skipped=3)
  values = {"reward/mean": 0.5, "reward/failed": 0.0, "optimizer/skipped_total": 3.0}
  progress = Progress(9, stream=io.StringIO())
  with metrics.Writer(tmp_path, config) as writer, ThreadPoolExecutor(1) as pool:
    clock = Clock(pool)
    clock.phase("update", jnp.zeros(()))
    outcome.flush(config, tmp_path, outcome.Pending(0, values, clock), writer, progress)
    with pytest.raises(
      outcome.RunError, match=r"optimizer.max_skipped = 3.*no checkpoint.*optimizer.learning_rate"
    ):
      outcome.flush(
        config,
        tmp_path,
        outcome.Pending(1, values | {"optimizer/skipped_total": 4.0}, clock),
        writer,
        progress,
      )
  assert len(metrics.read(tmp_path)) == 2
