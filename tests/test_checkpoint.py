"""Checkpoints come back bit for bit, in part or whole, and onto other devices.

A checkpoint that is incomplete or damaged is never accepted.
"""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from dancegrpo_jax.checkpoints import store
from dancegrpo_jax.checkpoints.store import CheckpointError
from dancegrpo_jax.devices import sharding

ONE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
ROOT = Path(__file__).parent.parent
META = {
  "iteration": 3,
  "config": {"size": [1, 2], "empty": [], "none": None, "rate": 1e-5, "rules": [[".*", []]]},
}


class State(NamedTuple):
  step: Any
  trainable: Any
  opt_state: Any
  ema: Any
  key: Any


def make_state(seed=0, ema=False) -> State:
  keys = jax.random.split(jax.random.key(seed), 2)
  kernel = jax.random.normal(keys[0], (64, 32))
  bias = jax.random.normal(keys[1], (32,)).astype(jnp.bfloat16)
  params = {"dense": {"kernel": kernel, "bias": bias}}
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(0.0, 1e-3, 10))
  )
  opt_state = jax.tree.map(lambda leaf: leaf + jnp.ones_like(leaf), optimizer.init(params))
  return State(
    jnp.int32(seed), params, opt_state, params if ema else None, jax.random.key(seed + 9)
  )


def abstract(state):
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=ONE), state
  )


def assert_equal(actual, expected):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
    if jax.dtypes.issubdtype(b.dtype, jax.dtypes.prng_key):
      a, b = jax.random.key_data(a), jax.random.key_data(b)
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.fixture
def saved(tmp_path):
  """A directory with iterations 2 and 3, of states with seeds 2 and 3."""
  with store.Saver(tmp_path / "checkpoints", keep=2) as saver:
    for iteration in (1, 2, 3):
      saver.save(iteration, make_state(iteration), META | {"iteration": iteration})
  return tmp_path / "checkpoints"


def test_round_trip_is_exact(saved):
  restored = store.restore(saved, abstract(make_state()))
  assert restored.iteration == 3 and restored.meta == META and type(restored.state) is State
  assert_equal(restored.state, make_state(3))
  assert_equal(store.restore(saved, abstract(make_state()), 2).state, make_state(2))


def test_the_last_k_are_kept(saved):
  assert store.steps(saved) == [2, 3] and store.latest(saved) == 3
  assert sorted(path.name for path in saved.iterdir()) == ["2", "3"]


def test_meta_is_read_alone(saved):
  assert store.read_meta(saved) == META
  assert store.read_meta(saved, 2)["iteration"] == 2


def test_a_part_is_read_alone(saved):
  part = store.restore_fields(saved, {"trainable": abstract(make_state().trainable)})
  assert list(part) == ["trainable"]
  assert_equal(part["trainable"], make_state(3).trainable)


def test_restores_onto_other_devices(saved, tmp_path):
  mesh = sharding.make_mesh(ConfigDict({"data": 2, "fsdp": 4, "tensor": 1}))
  split, whole = NamedSharding(mesh, P("fsdp")), sharding.replicated(mesh)
  target = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split if x.ndim == 2 else whole),
    make_state(),
  )
  state = store.restore(saved, target).state
  assert state.trainable["dense"]["kernel"].sharding == split
  assert state.trainable["dense"]["kernel"].addressable_shards[0].data.shape == (16, 32)
  assert_equal(state, make_state(3))
  # The way back: saved from eight devices, read on one.
  with store.Saver(tmp_path / "again", keep=1) as saver:
    saver.save(4, state, {})
  assert_equal(store.restore(tmp_path / "again", abstract(make_state())).state, make_state(3))


def test_a_saved_state_may_be_donated(tmp_path):
  size = 3_000_000
  state = {"trainable": {"w": jnp.arange(size, dtype=jnp.float32)}}
  with store.Saver(tmp_path, keep=1) as saver:
    saver.save(1, state, {})
    overwrite = jax.jit(
      lambda tree: jax.tree.map(lambda leaf: leaf * 0 - 1, tree), donate_argnums=0
    )
    jax.block_until_ready(overwrite(state))
  target = {"trainable": {"w": jax.ShapeDtypeStruct((size,), jnp.float32, sharding=ONE)}}
  np.testing.assert_array_equal(
    store.restore(tmp_path, target).state["trainable"]["w"], np.arange(size, dtype=np.float32)
  )


def test_saving_an_iteration_again_leaves_it(saved):
  with store.Saver(saved, keep=2) as saver:
    saver.save(3, make_state(7), {})
  assert_equal(store.restore(saved, abstract(make_state())).state, make_state(3))


# What can't be restored


def test_no_checkpoint(tmp_path, saved):
  assert store.latest(tmp_path / "nowhere") is None
  with pytest.raises(
    CheckpointError, match="nowhere: no such directory; give the checkpoints/ of a workdir"
  ):
    store.restore(tmp_path / "nowhere", abstract(make_state()))
  (tmp_path / "empty").mkdir()
  with pytest.raises(CheckpointError, match="holds no checkpoint"):
    store.restore(tmp_path / "empty", abstract(make_state()))
  with pytest.raises(CheckpointError, match="no checkpoint of iteration 7; it has 2, 3"):
    store.restore(saved, abstract(make_state()), 7)


def remove(path: Path):
  if path.is_dir():
    for child in path.iterdir():
      remove(child)
    path.rmdir()
  else:
    path.unlink()


@pytest.mark.parametrize(
  "victim", ["trainable", "opt_state/_METADATA", "trainable/manifest.ocdbt", "trainable/d"]
)
def test_missing_files_are_named(saved, victim):
  remove(saved / "3" / victim)
  with pytest.raises(
    CheckpointError,
    match=f"3: truncated, without .*{victim}.*; delete that folder to use iteration 2",
  ):
    store.restore(saved, abstract(make_state()))
  assert_equal(store.restore(saved, abstract(make_state()), 2).state, make_state(2))


@pytest.mark.parametrize("change", ["gone", "half", "empty"])
def test_cut_data_is_an_error(saved, change):
  largest = max(
    (saved / "3" / "trainable").rglob("*"), key=lambda path: path.stat().st_size * path.is_file()
  )
  content = largest.read_bytes()
  largest.unlink() if change == "gone" else largest.write_bytes(
    content[: len(content) // 2 if change == "half" else 0]
  )
  with pytest.raises(
    CheckpointError, match="3: truncated or damaged .*; delete that folder to use iteration 2"
  ):
    store.restore(saved, abstract(make_state()))


def test_another_model_is_named_leaf_by_leaf(saved):
  state = make_state()
  state.trainable["dense"]["kernel"] = jnp.zeros((64, 16))
  state.trainable["dense"]["scale"] = jnp.zeros((3,))
  with pytest.raises(CheckpointError) as caught:
    store.restore(saved, abstract(state))
  assert "trainable/dense/kernel is float32[64, 32] there, float32[64, 16] here" in str(
    caught.value
  )
  assert "trainable/dense/scale is absent there, float32[3] here" in str(caught.value)


def test_other_fields_are_named(saved, tmp_path):
  with pytest.raises(CheckpointError, match="has no ema; it holds step, trainable, opt_state, key"):
    store.restore(saved, abstract(make_state(ema=True)))
  with store.Saver(tmp_path / "ema", keep=1) as saver:
    saver.save(1, make_state(ema=True), {})
  with pytest.raises(CheckpointError, match="holds ema, which this run's state does not have"):
    store.restore(tmp_path / "ema", abstract(make_state()))


SAVE_UNTIL_KILLED = """
  import sys
  import jax.numpy as jnp
  from dancegrpo_jax.checkpoints import store
  saver = store.Saver(sys.argv[1], keep=3)
  for iteration in range(1, 1000):
    state = {"w": jnp.full((2_000_000,), iteration, jnp.float32)}
    saver.save(iteration, state, {"iteration": iteration})
"""


def test_a_killed_save_never_looks_like_a_good_one(tmp_path):
  process = subprocess.Popen(
    [sys.executable, "-c", textwrap.dedent(SAVE_UNTIL_KILLED), str(tmp_path)],
    cwd=ROOT,
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
    stderr=subprocess.DEVNULL,
  )
  deadline = time.time() + 120
  while len(store.steps(tmp_path)) < 2 and time.time() < deadline:
    time.sleep(0.02)
  process.send_signal(signal.SIGKILL)
  process.wait()
  found = store.steps(tmp_path)
  assert found
  for iteration in found:
    restored = store.restore(
      tmp_path, {"w": jax.ShapeDtypeStruct((2_000_000,), jnp.float32, sharding=ONE)}, iteration
    )
    assert restored.meta == {"iteration": iteration}
    assert (np.asarray(restored.state["w"]) == iteration).all()
  with store.Saver(tmp_path, keep=3) as saver:  # partial files do not stop the next run
    saver.save(found[-1] + 1, {"w": jnp.zeros((2,))}, {})
  assert all(path.name.isdigit() for path in tmp_path.iterdir())
