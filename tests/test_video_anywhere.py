"""Clips on any devices: the promises of docs/promises.md for HunyuanVideo, on meshes of 1 to 8
devices, after resuming on other ones, and in two processes.

Texts have different lengths. The rules split the transformer over fsdp and tensor.
"""

import functools
from typing import Any

import jax
import numpy as np
import pytest
from test_anywhere import (
  COMMON,
  ITERATIONS,
  MESHES,
  Machine,
  assert_alike,
  assert_same_course,
  axes_of,
  iterate,
  prepared,
)
from test_distributed import finish, free_port, start, together
from tiny_checkpoint import assert_trees_equal, relative_error, update_of, write_hunyuan_video

from dancegrpo_jax.assembly import encoding
from dancegrpo_jax.checkpoints import store
from dancegrpo_jax.devices import sharding
from dancegrpo_jax.models import hunyuan_video
from dancegrpo_jax.pipelines.networks import abstract_hunyuan_video
from dancegrpo_jax.report import metrics
from dancegrpo_jax.rl import lanes
from dancegrpo_jax.types import Conditioning

# By the names of HunyuanVideo's parameters. Kernels `[.., in, out]` are split along `in` over fsdp,
# as FLUX's are (configs/flux.py says why), and along `out` over tensor, which has one device in a
# recipe. The layers at the ends of the transformer are small, and so are the scales of norms.
SPLIT = (
  ("denoiser/(single_)?transformer_blocks.*/kernel", ("...", "fsdp", "tensor")),
  ("denoiser/(single_)?transformer_blocks.*/bias", ("...", "fsdp")),
  ("denoiser/context_embedder/token_refiner/.*/kernel", ("...", "fsdp", "tensor")),
  ("denoiser/(context_embedder|norm_out|time_text_embed)/.*kernel", ("fsdp", "tensor")),
  ("text_encoder/layers.*/kernel", ("...", "fsdp", "tensor")),
  ("text_encoder/embed_tokens/embedding", (None, "fsdp")),
  ("text_encoder_2/encoder/.*/kernel", ("...", "fsdp", "tensor")),
  (".*", ()),
)
# Of these some fill all 8 tokens, and others don't.
TEXTS = (
  "cat",
  "a red boat",
  "a red boat a blue house",
  "a red cat a blue boat a red house",
  "blue apple",
  "house",
  "a blue cat",
  "a blue apple a red apple",
)
SCORER = '''
def score(pixels, prompts, metadata):
  """How much brighter the last frame of a clip of 9 frames is than its first."""
  assert pixels.shape[1:] == (9, 16, 16, 3), pixels.shape
  return pixels[:, -1].mean((1, 2, 3)) - pixels[:, 0].mean((1, 2, 3))
'''
VIDEO = COMMON | {
  "model__family": "hunyuan_video",
  "model__size": (16, 16),
  "model__frames": 9,
  "model__fps": 12.0,
  "model__text_length": 8,
  "model__scan_blocks": True,
  "model__remat": True,
  "model__decode_batch": 2,
  "sampler__kind": "flow",
  "sampler__shift": 0.0,
  "sampler__noise_level": 0.7,
  "sampler__embedded_guidance": 6.0,
  "reward__terms": (("clip_scorer_anywhere:score", 1.0),),
  "data__held_out": "",
  "mesh__rules": SPLIT,
}


@pytest.fixture(scope="module", autouse=True)
def quick_to_compile():
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
  """The changes of the tiny config for a HunyuanVideo folder; its parent has the reward."""
  root = tmp_path_factory.mktemp("video_anywhere")
  (root / "clip_scorer_anywhere.py").write_text(SCORER)
  (root / "texts.txt").write_text("\n".join(TEXTS) + "\n")
  folder = write_hunyuan_video(root / "hunyuan")
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(root)
    yield VIDEO | {"model__checkpoint": folder, "data__prompts": root / "texts.txt"}


@pytest.fixture(scope="module")
def machine(settings, tmp_path_factory):
  """`mesh sizes -> Machine`; each is made once."""

  @functools.cache
  def make(sizes: tuple[int, int, int]) -> Machine:
    return prepared(None, tmp_path_factory.mktemp("machine"), sizes, **settings)

  return make


@pytest.fixture(scope="module")
def trained(machine, tmp_path_factory):
  """`mesh sizes -> (Trained, checkpoints' folder, initial parameters)`; each is run once."""

  @functools.cache
  def run(sizes: tuple[int, int, int]) -> tuple:
    here, folder = machine(sizes), tmp_path_factory.mktemp("trained") / "checkpoints"
    initial = jax.device_get(here.state.trainable)
    return iterate(here, jax.tree.map(jax.numpy.copy, here.state), folder=folder), folder, initial

  return run


# test_video_run.py trains on eight devices along data.
SOME_MESHES = [*(pytest.param(sizes, marks=pytest.mark.slow) for sizes in MESHES[1:3]), MESHES[3]]


@pytest.mark.parametrize("sizes", SOME_MESHES)
def test_every_mesh_trains_alike(trained, sizes):
  """First gradient, metrics and parameters; the ratio is exactly 1 before each update."""
  assert_alike(trained(sizes), trained(MESHES[0]), sizes)
  for row in (*trained(sizes)[0].rows, *trained(MESHES[0])[0].rows):
    assert row["ratio/min"] == row["ratio/max"] == 1.0
    # A rollout's own log-probs are those of the update but for round-off, too.
    assert row["ratio/rollout_drift_max"] < 1e-5


def drawn(here: Machine, rows: Any = None) -> tuple:
  """Of a machine's first iteration: conditioning, ids of the prompts, and a chunk's rollout.

  `rows` stand in the place of the encoders' where they are given.
  """
  session = here.session
  batch, config = session.batches[0], session.config
  ids = np.array([example.id for example in batch], np.int32)
  samples = len(batch) * config.rollout.samples_per_prompt
  with jax.set_mesh(here.mesh):
    conditioning = encoding.conditioning(config, session.encode, batch)
    if rows is not None:
      conditioning = jax.device_put(Conditioning(rows, None), sharding.replicated(here.mesh))
    rollouts = tuple(
      session.programs.rollout(
        here.state.trainable, session.model.frozen, conditioning, ids, chunk, np.int32(0)
      )
      for chunk in lanes.deal(samples, config.rollout.chunk, config.mesh.lanes)
    )
  return conditioning, ids, rollouts


@pytest.mark.parametrize("sizes", SOME_MESHES)
def test_every_mesh_draws_the_same_noise(machine, sizes):
  """The first latents are equal bit for bit, and the last ones but for round-off."""
  for one, other in zip(drawn(machine(MESHES[0]))[2], drawn(machine(sizes))[2], strict=True):
    assert one.latents.shape[1:] == (8, 3, 4, 4, 4)  # samples, frames, height, width, channels
    np.testing.assert_array_equal(other.latents[0], one.latents[0])
    assert relative_error(other.sample, one.sample) < 1e-4


@pytest.mark.parametrize("saved_on, sizes", [(MESHES[3], MESHES[0]), (MESHES[0], MESHES[3])])
def test_a_run_goes_on_on_other_devices(trained, machine, saved_on, sizes):
  expected, folder, initial = trained(saved_on)
  here = machine(sizes)
  restored = store.restore(folder, here.abstract, 1).state
  resumed = iterate(here, restored, first=1)
  assert_same_course(resumed.rows, resumed.parameters[-1], expected, initial, first=1)


# Padded text


def updated(here: Machine, conditioning: Conditioning, ids: np.ndarray, rollouts: tuple) -> Any:
  """The parameters after an update whose advantages are 1 and -1 by turns."""
  model, numbers = here.session.model, np.arange(16, dtype=np.int32)
  advantage = np.where(numbers % 2, 1.0, -1.0).astype(np.float32)
  rest = (advantage, np.ones(16, np.float32), numbers, np.int32(0))
  state = jax.tree.map(jax.numpy.copy, here.state)
  with jax.set_mesh(here.mesh):
    state, _ = update_of(
      here.session.programs, state, model.frozen, None, conditioning, ids, rollouts, *rest
    )
  return jax.device_get(state.trainable)


@pytest.mark.parametrize("sizes", [MESHES[0], MESHES[3]])
def test_padded_text_changes_nothing(machine, sizes):
  """Whatever stands after the end of a text: neither samples nor log-probs nor the update. What
  stands before it does.
  """
  here = machine(sizes)
  conditioning, ids, rollouts = drawn(here)
  rows = jax.device_get(conditioning.positive)
  lengths = rows["lengths"]
  assert lengths.dtype == np.int32 and lengths.max() == 8 and len(set(lengths.tolist())) > 2
  padding = np.arange(8)[None, :, None] >= lengths[:, None, None]
  noise = 1e3 * np.random.default_rng(0).standard_normal(rows["text"].shape, np.float32)
  other = rows | {"text": np.where(padding, noise, rows["text"])}
  again, _, redrawn = drawn(here, other)
  assert_trees_equal(redrawn, rollouts)
  before = updated(here, conditioning, ids, rollouts)
  assert_trees_equal(updated(here, again, ids, rollouts), before)

  last = np.arange(8)[None, :, None] == lengths[:, None, None] - 1
  third, _, redrawn = drawn(here, rows | {"text": np.where(last, noise, rows["text"])})
  assert relative_error(redrawn[0].sample, rollouts[0].sample) > 1e-3
  assert relative_error(updated(here, third, ids, rollouts), before) > 1e-6


# Several processes


def test_two_processes_are_one_run(trained, settings, machine, tmp_path):
  """The command in two processes, with a reward on the host, gives the numbers of one process."""
  sizes, workdir = MESHES[3], tmp_path / "run"
  expected, _, initial = trained(sizes)
  variables = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "PYTHONPATH": str(settings["model__checkpoint"].parent),
  }
  changes = settings | axes_of(sizes)
  processes = [
    start(None, workdir, *flags, devices=4, environment=variables, **changes)
    for flags in together(free_port(), 2)
  ]
  results = finish(processes, seconds=900)
  assert [code for code, _, _ in results] == [0, 0], results[0][2] + results[1][2]
  rows = metrics.read(workdir)
  assert [row["iteration"] for row in rows] == list(range(ITERATIONS))
  state = store.restore(workdir / "checkpoints", machine(sizes).abstract, ITERATIONS).state
  assert_same_course(rows, jax.device_get(state.trainable), expected, initial)


# The rules at full size


@pytest.mark.parametrize("sizes", [(1, 64, 1), (1, 32, 2)])
def test_the_rules_split_the_published_transformer(sizes):
  """By the shapes of the published transformer, which are the defaults of its fields: everything
  of a megabyte or more is split over fsdp, and its axes divide by the devices.
  """
  devices = np.resize(np.array(jax.devices()), sizes)  # nothing is put on them
  mesh = jax.sharding.Mesh(devices, sharding.AXES)
  network = hunyuan_video.HunyuanVideoTransformer3DModel(scan_blocks=True)
  abstract = {"denoiser": abstract_hunyuan_video(network)}
  shardings = sharding.infer_shardings(abstract, (*SPLIT[:4], SPLIT[-1]), mesh)
  leaves = jax.tree_util.tree_leaves_with_path(abstract)
  assert sum(leaf.size for _, leaf in leaves) == 12_821_012_544  # of the published file
  for (path, leaf), place in zip(leaves, jax.tree.leaves(shardings), strict=True):
    is_split = "fsdp" in jax.tree.leaves(tuple(place.spec))
    assert is_split or leaf.size * 4 < 2**20, (jax.tree_util.keystr(path), leaf.shape)
