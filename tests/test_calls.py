"""An update in calls of any length: the same bits, and it can be given up between two calls."""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from test_distributed import finish, start
from tiny_checkpoint import (
  Toy,
  assert_trees_equal,
  relative_error,
  tiny_config,
  toy_programs,
  update_of,
)

from dancegrpo_jax.assembly import loading
from dancegrpo_jax.checkpoints import store
from dancegrpo_jax.compilation import inventory
from dancegrpo_jax.devices import sharding
from dancegrpo_jax.programs import update_calls
from dancegrpo_jax.programs.update_calls import UpdateCall
from dancegrpo_jax.report import metrics
from dancegrpo_jax.rl import lanes
from dancegrpo_jax.rl.state import TrainState

SAMPLES, ITERATIONS = 16, 2
ADVANTAGE = np.random.default_rng(0).standard_normal(SAMPLES).astype(np.float32)
WEIGHT = (np.arange(SAMPLES) != 5).astype(np.float32)
# 6 steps of 16 samples are trained, in microbatches of 8: 12 of them.
SETTINGS = {
  "sampler__steps": 7,
  "rollout__chunk": 8,
  "optimizer__microbatch": 8,
  "optimizer__updates_per_iteration": 3,
  "optimizer__learning_rate": 1e-2,
  "optimizer__eps": 1e-3,
  "optimizer__weight_decay": 1e-2,
}
FULL = {"objective__kl__weight": 0.1, "ema__decay": 0.9}
KINDS = {
  "recompute": {},
  "recompute, guard, KL, EMA": FULL | {"objective__guard": True},
  "rollout, KL, EMA": FULL | {"objective__old_log_prob": "rollout"},
  "one optimizer step, KL, EMA": FULL | {"optimizer__updates_per_iteration": 1},
}


def test_bounds_are_whole_calls_and_a_rest():
  assert (
    update_calls.bounds(5, 0) == update_calls.bounds(5, 5) == update_calls.bounds(5, 9) == [(0, 5)]
  )
  assert update_calls.bounds(5, 1) == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]
  assert update_calls.bounds(5, 2) == [(0, 2), (2, 4), (4, 5)]
  assert update_calls.bounds(6, 3) == [(0, 3), (3, 6)]
  assert update_calls.bounds(0, 0) == update_calls.bounds(0, 3) == []


def test_calls_are_listed_in_their_order():
  names = ("deal", "remember", "accumulate", "first_step", "step", "summary")
  assert update_calls.listed(names, 2, 3, 2) == [
    UpdateCall("remember", 0, 0, 2),
    UpdateCall("remember", 0, 2, 3),
    UpdateCall("accumulate", 0, 0, 2),
    UpdateCall("accumulate", 0, 2, 3),
    UpdateCall("first_step", 0),
    UpdateCall("accumulate", 1, 0, 2),
    UpdateCall("accumulate", 1, 2, 3),
    UpdateCall("step", 1),
  ]
  few = ("deal", "accumulate", "step", "summary")
  assert update_calls.listed(few, 1, 3, 0) == [
    UpdateCall("accumulate", 0, 0, 3),
    UpdateCall("step", 0),
  ]


class Prepared(NamedTuple):
  """A toy run.

  Attributes:
    toy: its programs.
    reference: trainable parameters that a KL penalty holds to, or None.
    jitted: the programs of its update; those of `toy` watch their calls.
    called: names of the update's programs, as they are called; a test may empty it.
    results: the `Sums` that the last call of one of them returned, alone in the list.
  """

  toy: Toy
  reference: Any
  jitted: dict[str, Any]
  called: list[str]
  results: list


@functools.cache
def prepared(kind: str, devices: int) -> Prepared:
  toy = toy_programs(jax.devices()[:devices], **SETTINGS | KINDS[kind])
  called, results = [], []

  def watched(name: str, program):
    def call(*arguments):
      called.append(name)
      result = program(*arguments)
      if name not in ("deal", "summary"):
        results[:] = [result[1] if "step" in name else result]
      return result

    return call

  programs = {name: watched(name, program) for name, program in toy.compiled.update.items()}
  reference = None
  if "KL" in kind:
    with jax.set_mesh(toy.mesh):
      reference = jax.tree.map(lambda x: 0.9 * jnp.copy(x), toy.trainable)
  return Prepared(
    toy=toy._replace(compiled=toy.compiled._replace(update=programs)),
    reference=reference,
    jitted=toy.compiled.update,
    called=called,
    results=results,
  )


def iteration(run: Prepared, state: Any, number: int, most: int, stop=lambda: False) -> Any:
  """(state, metrics) after an iteration with random advantages, None where it was stopped."""
  toy, ids = run.toy, np.arange(4, dtype=np.int32)
  rolled = tuple(
    toy.compiled.rollout(state.trainable, {}, toy.conditioning, ids, chunk, np.int32(number))
    for chunk in lanes.deal(SAMPLES, 8, 8)
  )
  rest = (WEIGHT * ADVANTAGE, WEIGHT, np.arange(SAMPLES, dtype=np.int32), np.int32(number))
  arguments = (toy.compiled, state, {}, run.reference, toy.conditioning, ids, rolled, *rest)
  return update_of(*arguments, most=most, stop=stop)


def trained(run: Prepared, most: int) -> tuple[Any, list[dict]]:
  """The state after some iterations, and the metrics of each, on the host."""
  rows = []
  with jax.set_mesh(run.toy.mesh):
    state = run.toy.new_state()
    for number in range(ITERATIONS):
      state, row = iteration(run, state, number, most)
      rows.append(jax.device_get(row))
  return jax.device_get(state), rows


@functools.cache
def in_one_call(kind: str, devices: int) -> tuple[Any, list[dict]]:
  return trained(prepared(kind, devices), 0)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_the_length_of_calls_changes_no_bit(kind, devices):
  """Of parameters, optimizer state, average, ratios and all other metrics.

  4 microbatches an optimizer step (12 of the only one), and 8 of the pass before: 3 does not divide
  4 and 8, nor 5 any of them.
  """
  run = prepared(kind, devices)
  expected, rows = in_one_call(kind, devices)
  for most in (1, 2, 3, 5):
    run.called.clear()
    state, found = trained(run, most)
    assert_trees_equal(state, expected)
    assert found == rows
    updates, microbatches = (1, 12) if kind.startswith("one") else (3, 4)
    passes = (updates - 1) * microbatches if kind.startswith("recompute") else 0
    assert run.called.count("accumulate") == ITERATIONS * updates * -(-microbatches // most)
    assert run.called.count("remember") == ITERATIONS * -(-passes // most)
  # What was compared is a training that moves, with all that the kind turns on.
  first = jax.device_get(run.toy.trainable)
  assert relative_error(expected.trainable, first) > 1e-3
  assert {row["ratio/max"] > row["ratio/min"] for row in rows} == {not kind.startswith("one")}
  assert all((row["kl"] > 0) == ("KL" in kind) and row["grad_norm"] > 0 for row in rows)
  assert (expected.ema is not None) == ("EMA" in kind)
  # One compilation serves all lengths.
  assert {name: program._cache_size() for name, program in run.jitted.items()} == dict.fromkeys(
    run.jitted, 1
  )


def is_valid(state: Any) -> bool:
  """Whether no array of a state has been donated."""
  return not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("kind", ["recompute, guard, KL, EMA", "one optimizer step, KL, EMA"])
def test_an_update_is_given_up_between_any_two_calls(kind):
  """The state before it stays, and an update of it is later the same as one that nobody stopped."""
  run, most = prepared(kind, 8), 3
  with jax.set_mesh(run.toy.mesh):
    state, _ = iteration(run, run.toy.new_state(), 0, most)
    kept = jax.device_get(state)
    run.called.clear()
    asked = [0]

    def never() -> bool:
      asked[0] += 1
      assert run.results[0].loss.is_ready()  # the call before is done
      return False

    expected = iteration(run, jax.tree.map(jnp.copy, state), 1, most, never)
    whole = [name for name in run.called if name in ("remember", "accumulate")]
    assert asked[0] == len(whole) - 1 == (3 if kind.startswith("one") else 2 * 3 + 3 - 1)
    for question in range(asked[0]):
      run.called.clear()
      answers = [False] * question + [True]
      assert iteration(run, state, 1, most, lambda answers=answers: answers.pop(0)) is None
      assert not answers and is_valid(state)
      called = [name for name in run.called if name in ("remember", "accumulate")]
      assert called == whole[: question + 1] and "summary" not in run.called
    assert_trees_equal(jax.device_get(state), kept)
    assert_trees_equal(jax.device_get(iteration(run, state, 1, most)), jax.device_get(expected))


def test_the_state_is_donated_to_the_step_after_which_nothing_stops():
  """With one optimizer step the state before it; with several that of each step but the first."""
  run = prepared("one optimizer step, KL, EMA", 8)
  with jax.set_mesh(run.toy.mesh):
    state = run.toy.new_state()
    iteration(run, state, 0, 0)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.trainable, state.opt_state)))
    run = prepared("recompute", 8)
    states, programs = [], run.toy.compiled.update

    def watched(before, *rest):
      states.append(before)
      return programs["step"](before, *rest)

    compiled = run.toy.compiled._replace(update=programs | {"step": watched})
    state = run.toy.new_state()
    iteration(run._replace(toy=run.toy._replace(compiled=compiled)), state, 0, 0)
    assert is_valid(state) and len(states) == 2
    for before in states:
      assert all(
        leaf.is_deleted() for leaf in jax.tree.leaves((before.trainable, before.opt_state))
      )


# The command


SIGNALLED = """
import os, signal, sys
from dancegrpo_jax import main
from dancegrpo_jax.compilation import ahead

put_together, seen = ahead.put_together, []

def watched(*arguments):
  run = put_together(*arguments)

  def accumulate(*given):
    seen.append(None)
    if len(seen) == {number}:
      os.kill(os.getpid(), signal.SIGTERM)
    return run.update["accumulate"](*given)

  def summary(*given):
    print("finished an update after", len(seen), flush=True)
    return run.update["summary"](*given)

  return run._replace(update=run.update | {{"accumulate": accumulate, "summary": summary}})

ahead.put_together = watched
sys.exit(main.main(sys.argv[1:]))
"""


def test_sigterm_in_an_update_saves_the_last_whole_iteration(tiny_models, tmp_path):
  """It comes in the third iteration's update, in its second optimizer step. The same command goes
  on, to the bits of a run that nobody stopped.
  """
  settings = {
    "iterations": 3,
    "evaluation__every": 0,
    "checkpoint__every": 100,
    "ema__decay": 0.9,
    "optimizer__updates_per_iteration": 2,
    "optimizer__microbatch": 8,
    "optimizer__microbatches_per_call": 1,
    "logging__compilation_cache": tmp_path / "cache",
    "environment": {
      "JAX_ENABLE_COMPILATION_CACHE": "true",
      "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    },
  }
  # 48 transitions are 2 optimizer steps of 3 calls each; the signal comes before the fifth.
  source = SIGNALLED.format(number=2 * 6 + 5)
  stopped = start(tiny_models, tmp_path / "run", source=source, **settings)
  ((code, output, errors),) = finish([stopped])
  assert code == 0, errors
  assert "stopped by SIGTERM: 2 iterations are saved" in output
  assert [line for line in output.splitlines() if line.startswith("finished an update")] == [
    "finished an update after 6",
    "finished an update after 12",
  ]
  assert store.latest(tmp_path / "run" / "checkpoints") == 2
  assert [row["iteration"] for row in metrics.read(tmp_path / "run")] == [0, 1]
  for name in ("run", "straight"):  # the first goes on, the other one is the measure
    ((code, _, errors),) = finish([start(tiny_models, tmp_path / name, **settings)])
    assert code == 0, errors
  rows, expected = (
    [without_times(row) for row in metrics.read(tmp_path / name)] for name in ("run", "straight")
  )
  assert rows == expected and len(rows) == 3
  config = tiny_config(tiny_models, ema__decay=0.9)
  states = [state_of(config, tmp_path / name / "checkpoints") for name in ("run", "straight")]
  assert_trees_equal(*states)
  assert states[0].step == 2 * 3


def without_times(row: dict) -> dict:
  return {k: v for k, v in row.items() if not k.startswith(("time/", "samples_per_second"))}


def state_of(config: ConfigDict, folder: Path) -> TrainState:
  """The last checkpoint of a run on one device, on the host."""
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
  outline = inventory.outline(inventory.without_weights(config), mesh)
  abstract = loading.abstract_state(config, outline, mesh, 8)
  return jax.device_get(store.restore(folder, abstract).state)
