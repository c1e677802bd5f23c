"""advantage.best_of: the trained samples are those of a selection in NumPy, and no device fetches
another one's trajectory.
"""

import functools
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from tiny_checkpoint import (
  TOY_SHAPE,
  Toy,
  noting,
  tiny_config,
  toy_pipeline,
  toy_programs,
  update_of,
)

from dancegrpo_jax.assembly import loading
from dancegrpo_jax.devices import sharding
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.pipelines.layout import Component
from dancegrpo_jax.plan import hlo
from dancegrpo_jax.rl import lanes

GROUP, BEST = 4, 2
ITERATION = np.int32(0)
# A group lies in one lane; in two lanes, which one device owns; on two devices.
WHOLE, SHARED, SPLIT = (8, 8, 8), (4, 4, 8), (8, 4, 8)
UNEVEN = (2, 6, 4)  # every second group begins in the middle of a lane


class Drawn(NamedTuple):
  """A toy run's rollouts of one iteration, and its scores `[prompts, GROUP]`; one is NaN."""

  toy: Toy
  ids: np.ndarray
  rollouts: tuple
  scores: np.ndarray


@functools.cache
def draw(devices: int, prompts: int, count: int) -> Drawn:
  """Samples in two chunks, on some devices and in `count` lanes."""
  samples = prompts * GROUP
  toy = toy_programs(
    jax.devices()[:devices],
    data__prompts_per_iteration=prompts,
    rollout__samples_per_prompt=GROUP,
    rollout__chunk=samples // 2,
    sampler__guidance_scale=1.0,
    mesh__lanes=count,
    advantage__best_of=BEST,
    optimizer__updates_per_iteration=1,
    optimizer__microbatch=count,
  )
  ids = np.arange(prompts, dtype=np.int32)
  with jax.set_mesh(toy.mesh):
    rollouts = tuple(
      toy.compiled.rollout(toy.trainable, {}, toy.conditioning, ids, chunk, ITERATION)
      for chunk in lanes.deal(samples, samples // 2, count)
    )
  scores = np.random.default_rng(3).standard_normal((prompts, GROUP)).astype(np.float32)
  scores[1, 2] = np.nan
  return Drawn(toy, ids, rollouts, scores)


def best_and_worst(scores: np.ndarray) -> np.ndarray:
  """Numbers of the best and the worst sample of each group, by a plain sort."""
  return np.array(
    [
      [row * GROUP + np.nanargmax(group), row * GROUP + np.nanargmin(group)]
      for row, group in enumerate(scores)
    ]
  ).reshape(-1)


def in_order(drawn: Drawn, name: str, count: int) -> np.ndarray:
  """An array of the rollouts, `[.., samples, ..]` by the samples' numbers."""
  samples = drawn.scores.size
  order = np.argsort(lanes.deal(samples, samples // 2, count).reshape(-1))
  return np.concatenate([getattr(part, name) for part in drawn.rollouts], axis=1)[:, order]


@pytest.mark.parametrize("devices, prompts, count", [WHOLE, SHARED, SPLIT, UNEVEN])
def test_the_trained_trajectories_are_those_of_a_selection_in_numpy(devices, prompts, count):
  drawn = draw(devices, prompts, count)
  run, expected = drawn.toy.compiled, best_and_worst(drawn.scores)
  with jax.set_mesh(drawn.toy.mesh):
    advantage, weight, chosen, _, _ = run.advantages({"clip": drawn.scores}, drawn.ids, {})
    arguments = (drawn.rollouts, drawn.ids, advantage, weight, chosen, ITERATION)
    work, _ = run.update["deal"](drawn.toy.trainable, *arguments)
  batch = jax.device_get(work.batch)
  for name in ("latents", "log_probs"):
    rows = in_order(drawn, name, count)[:, expected]
    wanted = rows.reshape(len(rows), count, -1, *rows.shape[2:])
    np.testing.assert_array_equal(getattr(batch, name), wanted, err_msg=name)
  np.testing.assert_array_equal(batch.prompt.reshape(-1), expected // GROUP)
  # The two of a group are moved to mean 0, so that one is minus the other; the best comes first.
  pairs = batch.advantage.reshape(prompts, BEST)
  np.testing.assert_allclose(pairs[:, 0], -pairs[:, 1], rtol=1e-5)
  assert (pairs[:, 0] > 0).all() and (batch.weight == 1).all()


def moved(program: Any, arguments: tuple) -> list[tuple[str, tuple[int, ...]]]:
  """The collectives of a program, with the shape of each array that is as large as a sample's
  latents.
  """
  summary = hlo.summary(program.lower(*arguments).compile().as_text())
  shapes = [
    (c.opcode, tuple(int(n) for n in dims.split(",") if n))
    for c in summary.collectives
    for dims in re.findall(r"\[([\d,]*)\]", c.shape)
  ]
  return [(opcode, shape) for opcode, shape in shapes if np.prod(shape) >= np.prod(TOY_SHAPE)]


@pytest.mark.parametrize(
  "devices, prompts, remedy", [(4, 6, "use 4 or 8, or"), (8, 6, "use 8, or"), (4, 8, "")]
)
def test_a_video_s_group_must_lie_on_one_device(devices, prompts, remedy):
  """A latent with four axes has frames; an image's has three, and is accepted with any number."""
  words = {"data__prompts_per_iteration": prompts, "advantage__best_of": BEST, "mesh__lanes": 8}
  weights = {"kernel": jax.ShapeDtypeStruct((2, 3), np.float32)}
  network = Component(folder="denoiser", table=[], abstract=weights)
  config, image = tiny_config(**words), toy_pipeline()._replace(components={"denoiser": network})
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:devices])
  video = image._replace(latent_shape=(3, *TOY_SHAPE))
  loading.outline(config, image, {}, mesh)
  if not remedy:
    loading.outline(config, video, {}, mesh)
    return
  with pytest.raises(ConfigError) as error:
    loading.outline(config, video, {}, mesh)
  line = str(error.value)
  assert len(line.splitlines()) == 1 and remedy in line and "advantage.best_of = 2" in line
  start = f"config.data.prompts_per_iteration = {prompts}: must be a multiple of data x fsdp"
  assert line.startswith(f"{start} = {devices} ")
  # All are trained without a selection, so that nothing has to be exchanged.
  loading.outline(tiny_config(**words | {"advantage__best_of": 0}), video, {}, mesh)


def unordered(shapes: Iterable[tuple[int, ...]]) -> list[list[int]]:
  """Shapes without axes of length 1, in any order: the compiler may transpose a gradient."""
  return sorted(sorted(size for size in shape if size > 1) for shape in shapes)


@pytest.mark.parametrize("devices, prompts, count", [WHOLE, SHARED])
def test_selection_moves_no_trajectory(devices, prompts, count):
  """Of all programs of an update: only gradients move, each once."""
  drawn = draw(devices, prompts, count)
  seen: dict = {}
  with jax.set_mesh(drawn.toy.mesh):
    run = noting(drawn.toy.compiled, seen)
    rest = run.advantages({"clip": drawn.scores}, drawn.ids, {})[:3]
    given = (drawn.toy.new_state(), {}, None, drawn.toy.conditioning, drawn.ids, drawn.rollouts)
    update_of(run, *given, *rest, ITERATION)
    found = {
      name: moved(program, seen[name]) for name, program in drawn.toy.compiled.update.items()
    }
  gradients = found.pop("accumulate")
  assert not any(found.values()), found
  assert {opcode for opcode, _ in gradients} == {"all-reduce"}
  parameters = [leaf.shape for leaf in jax.tree.leaves(drawn.toy.trainable)]
  assert unordered(shape for _, shape in gradients) == unordered(parameters)
