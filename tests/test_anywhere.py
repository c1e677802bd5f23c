"""The numbers of a run are the same on any devices.

That is on meshes of 1 to 8 devices, after resuming on other devices, and on two or four processes
against one of eight devices. Every network is as small as it can be and is compiled without most of
LLVM's passes, because the tests are about how programs are split. Iterations are those of
`collect` and `train.update`, without the loop's evaluation; several processes run the command.
"""

import functools
import io
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from test_distributed import finish, free_port, start, together
from tiny_checkpoint import (
  FLUX_VAE,
  ROOT,
  UNET,
  VAE,
  Folders,
  tiny_config,
  toy_programs,
  update_of,
  write_flux,
  write_models,
)

from dancegrpo_jax import train
from dancegrpo_jax.checkpoints import store
from dancegrpo_jax.data import prompts
from dancegrpo_jax.devices import sharding
from dancegrpo_jax.report import metrics
from dancegrpo_jax.report.clock import Clock
from dancegrpo_jax.report.progress import Progress
from dancegrpo_jax.rl import lanes
from dancegrpo_jax.settings import stored_config
from dancegrpo_jax.training.collecting import collect
from dancegrpo_jax.training.session import Session, prepare

ITERATIONS = 3
MESHES = ((1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2))
SHORT_UNET = UNET | {
  "block_out_channels": (16,),
  "down_block_types": ("DownBlock2D",),
  "up_block_types": ("UpBlock2D",),
}
SHORT_VAE = {
  "down_block_types": ("DownEncoderBlock2D",),
  "up_block_types": ("UpDecoderBlock2D",),
  "block_out_channels": (8,),
}
SCORER = '''
import os
from pathlib import Path

def score(pixels, prompts, metadata):
  """How red a picture is. Raises where the file that FAIL names is there."""
  if "FAIL" in os.environ and Path(os.environ["FAIL"]).exists():
    raise ConnectionError("the scorer is down")
  return pixels[..., 0].mean((1, 2)) - pixels[..., 1].mean((1, 2))
'''
HOST = (("scorer_anywhere:score", 1.0),)
COMMON = {
  "iterations": ITERATIONS,
  "model__size": (8, 8),
  "optimizer__learning_rate": 1e-3,
  "optimizer__eps": 1e-6,
  "optimizer__max_grad_norm": 1e6,
  "evaluation__every": 0,
  "checkpoint__every": 3,
  "checkpoint__keep": 9,
  "rollout__chunk": 8,
  # The step with the least noise has a std of .03, and its gradient is mostly round-off.
  "sampler__steps": 4,
  "sampler__window__size": 2,
}
SD = COMMON | {
  "reward__terms": (("clip", 1.0), *HOST),
  "reward__combine": "rewards",
  "mesh__rules": (
    (
      "denoiser/(down|mid|up).*(conv[12]|conv_shortcut|proj_in|proj_out)/kernel",
      (None, None, "fsdp", "tensor"),
    ),
    ("denoiser/.*(proj|to_[qkv]|to_out_0|net_2|linear_[12])/kernel", ("fsdp", "tensor")),
    ("text_encoder/.*kernel", ("fsdp", "tensor")),
    (".*", ()),
  ),
}
EMOJI = {key: value for key, value in SD.items() if key != "model__size"}
FLUX = COMMON | {
  "reward__terms": HOST,
  "model__family": "flux",
  "model__text_length": 8,
  "model__scan_blocks": True,
  "model__remat": True,
  "sampler__kind": "flow",
  "sampler__shift": 0.0,
  "sampler__noise_level": 0.7,
  "mesh__rules": (
    ("denoiser/.*transformer_blocks/.*kernel", (None, "fsdp", "tensor")),
    ("denoiser/.*kernel", ("fsdp", "tensor")),
    (".*", ()),
  ),
}


class Machine(NamedTuple):
  """A run on some devices: its programs, and the state before the first iteration."""

  mesh: Any
  session: Session
  state: Any
  abstract: Any  # shapes, dtypes and shardings of the state


class Trained(NamedTuple):
  """Results: metrics and parameters of each iteration, and Adam's first moment after the first."""

  rows: list
  parameters: list
  moment: Any
  state: Any


@pytest.fixture(scope="module", autouse=True)
def quick_to_compile():
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  """Folders of the networks, and of a module with the reward that runs on the host."""
  root = tmp_path_factory.mktemp("anywhere")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr("tiny_checkpoint.UNET", SHORT_UNET)
    patch.setattr("tiny_checkpoint.VAE", VAE | SHORT_VAE)
    patch.setattr("tiny_checkpoint.FLUX_VAE", FLUX_VAE | SHORT_VAE)
    folders = write_models(root)
    write_flux(root / "flux")
    (root / "scorer_anywhere.py").write_text(SCORER)
    patch.syspath_prepend(root)
    yield folders


@pytest.fixture(scope="module")
def machine(models, tmp_path_factory):
  """`(network, mesh sizes) -> Machine`; each is made once."""

  @functools.cache
  def make(network: str, sizes: tuple[int, int, int]) -> Machine:
    changes = {
      "sd": SD,
      "flux": FLUX | {"model__checkpoint": str(models.model.parent / "flux")},
      "emoji": EMOJI,
    }[network]
    folders = None if network == "emoji" else models
    return prepared(folders, tmp_path_factory.mktemp("machine"), sizes, **changes)

  return make


def axes_of(sizes: tuple[int, int, int]) -> dict[str, int]:
  """The changes of a config for a mesh of these sizes along data, fsdp and tensor."""
  return dict(zip(("mesh__data", "mesh__fsdp", "mesh__tensor"), sizes))


def prepared(
  folders: Folders | None, workdir: Path, sizes: tuple[int, int, int], **changes
) -> Machine:
  """The run of a tiny config with `changes` on a mesh of these sizes, ready for iterations."""
  config = tiny_config(folders, **changes, **axes_of(sizes))
  mesh = sharding.make_mesh(config.mesh, jax.devices()[: prod(sizes)])
  with jax.set_mesh(mesh):
    examples, progress = prompts.read_examples(config), Progress(1, stream=io.StringIO())
    session, state = prepare(config, workdir, examples, mesh, 0, progress)
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )
  return Machine(mesh, session, state, abstract)


def adam(opt_state: Any) -> Any:
  """Adam's state among the states of Optax's transformations."""
  has = lambda part: hasattr(part, "mu")  # noqa: E731
  return next(part for part in jax.tree.leaves(opt_state, is_leaf=has) if has(part))


def iterate(machine: Machine, state: Any, first: int = 0, folder: Path | None = None) -> Trained:
  """Runs iterations from `first` on, as the loop does.

  Saves a checkpoint after each iteration where a folder is given.
  """
  session, rows, parameters, moment = machine.session, [], [], None
  with jax.set_mesh(machine.mesh), ThreadPoolExecutor(2) as pool:
    for iteration in range(first, ITERATIONS):
      seen = collect(
        session, state.trainable, iteration, Clock(pool), pool, print, keep_pixels=False
      )
      state, values, _ = train.update(session, state, seen, iteration, Clock(pool), lambda: False)
      rows.append({name: float(value) for name, value in values.items()})
      parameters.append(jax.device_get(state.trainable))
      if iteration == 0:
        moment = jax.device_get(adam(state.opt_state).mu)
      if folder:
        with store.Saver(folder, keep=9) as saver:
          saver.save(
            iteration + 1, state, {"config": session.config.to_dict(), "iteration": iteration + 1}
          )
  return Trained(rows, parameters, moment, state)


@pytest.fixture(scope="module")
def trained(machine, tmp_path_factory):
  """`(network, mesh sizes) -> (Trained, checkpoints' folder, initial parameters)`.

  Each is run once.
  """

  @functools.cache
  def run(network: str, sizes: tuple[int, int, int]) -> tuple:
    here, folder = machine(network, sizes), tmp_path_factory.mktemp("trained") / "checkpoints"
    initial = jax.device_get(here.state.trainable)
    return iterate(here, here.state, folder=folder), folder, initial

  return run


def distance(a: Any, b: Any) -> float:
  """Euclidean distance over all leaves."""
  pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return float(np.sqrt(sum(np.square(np.asarray(x, np.float64) - y).sum() for x, y in pairs)))


def assert_same_course(
  actual: list, parameters: Any, expected: Trained, initial: Any, first: int = 0
) -> None:
  """Rows from iteration `first` on and the final parameters are within the design's bounds."""
  moved = distance(expected.parameters[-1], initial)
  assert moved > 0 and distance(parameters, expected.parameters[-1]) <= 1e-2 * moved
  for row, other in zip(actual, expected.rows[first:], strict=True):
    assert row["ratio/drift_max"] == 0 and row["reward/failed"] == 0 and row["grad_norm"] > 0
    assert abs(row["reward/mean"] - other["reward/mean"]) <= 1e-3


@pytest.mark.parametrize(
  "sizes", [MESHES[1], pytest.param(MESHES[2], marks=pytest.mark.slow), *MESHES[3:]]
)
@pytest.mark.parametrize("network", ["sd", "flux"])
def test_every_mesh_trains_alike(trained, network, sizes):
  assert_alike(trained(network, sizes), trained(network, MESHES[0]), sizes)


@pytest.mark.full_size
@pytest.mark.parametrize("sizes", MESHES[1:])
def test_every_mesh_trains_the_emoji_model_alike(trained, sizes):
  assert_alike(trained("emoji", sizes), trained("emoji", MESHES[0]), sizes)


def assert_alike(actual: tuple, expected: tuple, sizes: tuple[int, int, int]) -> None:
  """First gradient, metrics and parameters agree with those of one device.

  Args:
    actual: of the fixture `trained`, on a mesh of `sizes`.
    expected: the same on one device.
    sizes: along data, fsdp and tensor.
  """
  (one, _, initial), (other, _, again) = expected, actual
  assert distance(initial, again) == 0
  zero = jax.tree.map(np.zeros_like, one.moment)
  error = distance(other.moment, one.moment) / distance(one.moment, zero)
  drift = distance(other.parameters[-1], one.parameters[-1]) / distance(one.parameters[-1], initial)
  print(f"{sizes}: gradient {error:.1e}, parameters {drift:.1e}")
  assert error <= 1e-5
  assert_same_course(other.rows, other.parameters[-1], one, initial)
  if sizes[1] > 1:  # the rules split parameters and optimizer state
    leaves = jax.tree.leaves((other.state.trainable, other.state.opt_state))
    assert sum(x.size for x in leaves if not x.is_fully_replicated) > 0.5 * sum(
      x.size for x in leaves
    )


# Resuming on other devices


@pytest.mark.parametrize("saved_on, sizes", [((2, 2, 2), (1, 1, 1)), ((1, 1, 1), (2, 2, 2))])
def test_a_run_goes_on_on_other_devices(trained, machine, saved_on, sizes):
  """A run that is resumed on other devices agrees with an uninterrupted run."""
  expected, folder, initial = trained("sd", saved_on)
  here = machine("sd", sizes)
  restored = store.restore(folder, here.abstract, 1).state
  assert all(
    a.sharding == b.sharding
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(here.abstract), strict=True)
  )
  resumed = iterate(here, restored, first=1)
  assert_same_course(resumed.rows, resumed.parameters[-1], expected, initial, first=1)


def toy_iterations(devices: int, first: int, last: int, folder: Path) -> list:
  """Runs the toy network on some devices, from a checkpoint where there is one.

  Returns the (scores, parameters) of each iteration.
  """
  toy = toy_programs(
    jax.devices()[:devices], optimizer__learning_rate=1e-3, optimizer__eps=1e-3, rollout__chunk=8
  )
  run, ids, seen = toy.compiled, np.arange(4, dtype=np.int32), []
  with jax.set_mesh(toy.mesh), store.Saver(folder, keep=9) as saver:
    state = toy.new_state()
    if first:
      abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
      )
      state = store.restore(folder, abstract, first).state
    for iteration in map(np.int32, range(first, last)):
      chunks = lanes.deal(16, 8, 8)
      rolled = tuple(
        run.rollout(state.trainable, {}, toy.conditioning, ids, chunk, iteration)
        for chunk in chunks
      )
      samples = np.concatenate([rollout.sample for rollout in rolled])[
        np.argsort(chunks.reshape(-1))
      ]
      scores = samples.mean((1, 2, 3)).reshape(4, 4)
      advantage, weight, chosen, _, _ = run.advantages({"clip": scores}, ids, {})
      rest = (advantage, weight, chosen, iteration)
      state, _ = update_of(run, state, {}, None, toy.conditioning, ids, rolled, *rest)
      saver.save(int(iteration) + 1, state, {})
      seen.append((scores, jax.device_get(state.trainable)))
  return seen


def test_from_eight_devices_to_four_two_and_one(tmp_path):
  """Runs one iteration on each number of devices, and resumes on the next."""
  straight = toy_iterations(8, 0, 5, tmp_path / "straight")
  parts = [
    toy_iterations(devices, i, i + 1, tmp_path / "moved")[0]
    for i, devices in enumerate((8, 4, 2, 1, 8))
  ]
  moved = distance(straight[-1][1], straight[0][1])
  assert moved > 0 and distance(parts[-1][1], straight[-1][1]) <= 1e-2 * moved
  for (scores, _), (expected, _) in zip(parts, straight, strict=True):
    np.testing.assert_allclose(scores, expected, atol=1e-3)


# Several processes


def command(
  models, workdir: Path, count: int, sizes: tuple, environments: dict | None = None, **settings
):
  """Runs the command in `count` processes with 8 / count devices each, on a mesh of `sizes`.

  Environment variables are given by process.
  """
  settings = SD | axes_of(sizes) | settings
  variables = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONPATH": str(models.model.parent)}
  return [
    start(
      models,
      workdir,
      *flags,
      devices=8 // count,
      environment=variables | (environments or {}).get(i, {}),
      **settings,
    )
    for i, flags in enumerate(together(free_port(), count))
  ]


def assert_one_run(rows: list, state: Any, expected: Trained, initial: Any) -> None:
  """The first iterations of several processes agree with those of one process."""
  assert_same_course(rows, jax.device_get(state.trainable), expected, initial)
  for row, other in zip(rows, expected.rows, strict=True):
    for name in (
      "reward/clip/mean",
      "reward/scorer_anywhere:score/mean",
      "reward/min",
      "reward/max",
      "grad_norm",
    ):
      np.testing.assert_allclose(row[name], other[name], rtol=1e-2, atol=1e-4, err_msg=name)


def test_two_processes_are_one_run(trained, models, machine, tmp_path):
  """The command in two processes, with a reward on the host, gives the numbers of one process.

  Then the reward fails in one of the processes, and SIGTERM is sent.
  """
  sizes, workdir, broken = (2, 2, 2), tmp_path / "run", tmp_path / "broken"
  expected, _, initial = trained("sd", sizes)
  settings = {"iterations": 1000, "logging__tensorboard": True}
  processes = command(models, workdir, 2, sizes, {1: {"FAIL": str(broken)}}, **settings)
  # The timer turns a hang into a failure.
  watchdog = threading.Timer(900, lambda: [process.kill() for process in processes])
  watchdog.start()
  said = []
  for line in processes[0].stdout:
    said.append(line)
    if line.startswith("iteration 3/"):
      broken.touch()
    if line.startswith("iteration 6/"):
      processes[1].send_signal(signal.SIGTERM)
      break
  results = finish(processes)
  watchdog.cancel()
  assert [code for code, _, _ in results] == [0, 0], "".join(said) + results[0][2] + results[1][2]

  rows, done = metrics.read(workdir), store.latest(workdir / "checkpoints")
  assert [row["iteration"] for row in rows] == list(range(done)) and done >= 6  # one process writes
  assert f"stopped by SIGTERM: {done} iterations are saved" in results[0][1]
  assert (
    len(list((workdir / "tensorboard").glob("*tfevents*"))) == 1
    and "<svg" in (workdir / "report.html").read_text()
  )
  assert {path.name for path in workdir.iterdir()} == {
    "checkpoints",
    "config.json",
    "environment.json",
    "metrics.jsonl",
    "report.html",
    "reward_errors.txt",
    "samples",
    "status.json",
    "tensorboard",
  }

  state = store.restore(workdir / "checkpoints", machine("sd", sizes).abstract, ITERATIONS).state
  assert_one_run(rows[:ITERATIONS], state, expected, initial)

  failed = {row["reward/failed"] for row in rows[ITERATIONS:]}
  # Half of the scores are the second process's; a quarter fails where a chunk was done before.
  assert 0.5 in failed and failed <= {0.0, 0.25, 0.5}
  assert re.search(
    r"process 1: reward scorer_anywhere:score failed for 4 samples: ConnectionError", results[1][1]
  )
  assert "failed" not in "".join(said) + results[0][1]


@pytest.mark.slow
def test_four_processes_share_the_kernels(trained, models, machine, tmp_path):
  """4 processes with 2 devices each give the numbers of one process.

  fsdp is over all devices, so that no process has a whole kernel.
  """
  sizes, workdir = (1, 8, 1), tmp_path / "run"
  expected, _, initial = trained("sd", sizes)
  results = finish(command(models, workdir, 4, sizes), seconds=900)
  assert [code for code, _, _ in results] == [0] * 4, results[0][1] + "".join(
    errors for _, _, errors in results
  )
  state = store.restore(workdir / "checkpoints", machine("sd", sizes).abstract, ITERATIONS).state
  rows = metrics.read(workdir)
  assert [row["iteration"] for row in rows] == list(range(ITERATIONS))
  assert_one_run(rows, state, expected, initial)


# Weights


LOAD = """
  import json, sys
  import jax
  from dancegrpo_jax.assembly import loading
  from dancegrpo_jax.checkpoints import safetensors_io
  from dancegrpo_jax.devices import sharding
  from dancegrpo_jax.settings import stored_config

  jax.distributed.initialize(sys.argv[1], 4, int(sys.argv[2]))
  config = stored_config.from_json(sys.argv[3])
  requested, read = [0], safetensors_io.Reader.read

  def counted(self, name, index):
    value = read(self, name, index)
    requested[0] += value.nbytes
    return value

  safetensors_io.Reader.read = counted
  mesh, pipeline = sharding.make_mesh(config.mesh), loading.build_pipeline(config)
  with jax.set_mesh(mesh):
    for name in pipeline.components:
      requested[0] = 0
      tree = loading.read(config, pipeline, [name], mesh)
      leaves = jax.tree.leaves(tree)
      whole = sum(x.nbytes for x in leaves if x.is_fully_replicated)
      split = sum(x.nbytes for x in leaves if not x.is_fully_replicated)
      print(json.dumps([name, requested[0], whole, split]), flush=True)
"""


def test_no_process_reads_more_than_its_share(models):
  """Each of 4 processes reads a quarter of what is split over fsdp, and all of the rest."""
  folder = str(models.model.parent / "flux")
  config = tiny_config(
    models, **FLUX | {"model__checkpoint": folder, "mesh__data": 1, "mesh__fsdp": 4}
  )
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "1",
    "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
  }
  address, text = f"127.0.0.1:{free_port()}", stored_config.to_json(config)
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", textwrap.dedent(LOAD), address, str(i), text],
      cwd=ROOT,
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(4)
  ]
  for code, output, errors in finish(processes):
    assert code == 0, errors
    rows = {name: rest for name, *rest in map(json.loads, output.splitlines())}
    for name, (requested, replicated, sharded) in rows.items():
      assert requested - replicated <= 1.05 * sharded / 4, name
    requested, replicated, sharded = rows["denoiser"]
    assert sharded > 10 * replicated and requested < sharded / 2
