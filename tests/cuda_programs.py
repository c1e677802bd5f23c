"""Lowers the programs of configs for NVIDIA GPUs on a machine without one.

Notes which kernel each attention gets. JAX refuses at lowering what cuDNN cannot compute. Stand-ins
answer its questions to the driver: they describe an H100 with cuDNN 9.19.

    python tests/cuda_programs.py      prints the tables of docs/gpus.md
"""

import contextlib
import gc
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jaxtyping
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from ml_collections import ConfigDict
from test_configs import CASES, load

from dancegrpo_jax import programs
from dancegrpo_jax.assembly import loading, reward_builders
from dancegrpo_jax.checkpoints import components
from dancegrpo_jax.compilation import calls, inventory
from dancegrpo_jax.devices import gpu_topologies, sharding
from dancegrpo_jax.models import attention
from dancegrpo_jax.models.attention import Place, Shape
from dancegrpo_jax.programs import iteration, jitted, update
from dancegrpo_jax.settings import stored_config

H100, A100 = Place("gpu", (9, 0)), Place("gpu", (8, 0))
PAGE = Path(__file__).parent.parent / "docs" / "gpus.md"
# Fields that do not change a program's graph: names, files, and numbers that are constants in it.
CONSTANTS = (
  "name",
  "seed",
  "iterations",
  "reward",
  "checkpoint",
  "logging",
  "data.prompts",
  "data.held_out",
  "data.shuffle",
  "evaluation.every",
  "evaluation.samples",
  "evaluation.seed",
  "evaluation.candidates",
  "evaluation.distractors",
  "optimizer.learning_rate",
  "optimizer.b1",
  "optimizer.b2",
  "optimizer.eps",
  "optimizer.weight_decay",
  "optimizer.max_grad_norm",
  "optimizer.max_skipped",
  "optimizer.microbatches_per_call",
  "objective.clip_range",
  "sampler.noise_level",
)


class Note(NamedTuple):
  """An attention in a program, and its kernels on two GPUs."""

  program: str
  shape: Shape
  h100: str
  a100: str


Notes = set[Note]


@contextlib.contextmanager
def h100() -> Iterator[Notes]:
  """Traces and lowers as on an H100.

  Yields the notes of all attentions of the programs that are traced meanwhile.
  """
  notes: Notes = set()
  names: list[str] = []
  kernel, program = attention.kernel, jitted.program

  def noted(impl: str, place: Place, shape: Shape, plain: bool) -> str:
    chosen = kernel(impl=impl, place=place, shape=shape, plain=plain)
    if names:
      notes.add(
        Note(names[-1], shape, chosen, kernel(impl=impl, place=A100, shape=shape, plain=plain))
      )
    return chosen

  def named(config, name, function, **options):
    def traced(*arguments):
      names.append(name)
      try:
        return function(*arguments)
      finally:
        names.pop()

    return program(config, name, traced, **options)

  with pytest.MonkeyPatch.context() as patch:
    for question, answer in gpu_topologies.driver_answers(H100.capability).items():
      patch.setattr(cudnn, question, answer)
    patch.setattr(attention, "place", lambda: H100)
    patch.setattr(attention, "kernel", noted)
    for module in (iteration, update):
      patch.setattr(module, "program", named)
    with unchecked():
      yield notes


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
  """Turns off the checks of shapes and reused keys, and the garbage collector.

  Other tests make these checks. Tracing takes most of the time here, and the checks would be half
  of it.
  """
  shapes, keys = jaxtyping.config.jaxtyping_disable, jax.config.jax_debug_key_reuse
  jaxtyping.config.update("jaxtyping_disable", True)
  jax.config.update("jax_debug_key_reuse", False)
  gc.disable()
  try:
    yield
  finally:
    gc.enable()
    jaxtyping.config.update("jaxtyping_disable", shapes)
    jax.config.update("jax_debug_key_reuse", keys)


def lower(call: calls.Call) -> jax.stages.Lowered:
  """Lowers the call's program for CUDA. Raises what JAX raises on a machine that has a GPU."""
  return call.program.trace(*call.arguments).lower(lowering_platforms=("cuda",))


def groups(family: str, devices: int, tiny: bool) -> list[list[ConfigDict]]:
  """The configs of a family in groups that differ only in rewards and constants.

  Args:
    family: the config's model.family.
    devices: number of devices; sharding rules matter only where there are several.
    tiny: whether to take the networks of this repository's assets, or those of published sizes.
  """
  found = defaultdict(list)
  for name, preset in CASES:
    config = load(name, preset)
    is_tiny = "assets/" in config.model.checkpoint
    if config.model.family == family and is_tiny == tiny:
      fields = stored_config.flatten(config)
      left_out = CONSTANTS + (("mesh",) if devices == 1 else ())
      counts = {key: value for key, value in fields.items() if not is_in(key, left_out)}
      found[tuple(counts.items())].append(config)
  return list(found.values())


def is_in(field: str, sections: tuple[str, ...]) -> bool:
  """Whether a field is one of these fields, or belongs to one of these sections."""
  return any(field == section or field.startswith(f"{section}.") for section in sections)


def lower_group(group: list[ConfigDict], devices: int) -> Notes:
  """Lowers every program of a group of `groups` and looks for calls of cuDNN in them.

  The mesh has the given number of devices.
  """
  mesh = sharding.make_mesh(group[0].mesh, jax.devices()[:devices])
  with h100() as notes:
    with (plain := group[0].copy_and_resolve_references()).unlocked():
      # The networks of the rewards are lowered below, each once.
      plain.reward.terms = (("compressibility", 1.0),)
      plain.reward.compressibility.frames = "first"  # of videos
    taken = inventory.take(
      inventory.without_weights(plain.lock()), mesh, examples=400, held_out=100
    )
    with jax.set_mesh(mesh):
      lowered = {call.name: lower(call) for call in taken.calls}
      for config in group:
        for call in reward_calls(config, taken, mesh):
          lower(call)
    fused = {note.program for note in notes if note.h100 == "cudnn"}
    for name in {"rollout", "update accumulate", "update remember"} & set(lowered):
      text, has_gradient = lowered[name].as_text(), name == "update accumulate"
      assert ("__cudnn$fmhaSoftmax" in text) == (name in fused), name
      assert ("__cudnn$fmhaSoftmaxBackward" in text) == (name in fused and has_gradient), name
  if "assets/" not in group[0].model.checkpoint:
    jax.clear_caches()  # traces of the published networks take gigabytes
  return notes


LOWERED = set()  # rewards, with all fields that their programs depend on


def reward_calls(
  config: ConfigDict, taken: inventory.Inventory, mesh: jax.sharding.Mesh
) -> list[calls.Call]:
  """The calls from pixels to advantages with a config's rewards.

  Empty where an earlier config had the same.
  """
  config = inventory.without_weights(config)
  decode = next(call for call in taken.calls if call.name == "decode")
  media = jax.eval_shape(decode.program, *decode.arguments)
  rules = config.mesh.reward_rules if mesh.size > 1 else ()
  key = (config.reward.to_json(), str(config.model), media.pixels.shape, str(rules), mesh.size)
  if key in LOWERED:
    return []
  LOWERED.add(key)
  files = reward_builders.FILES._replace(
    tokenizer=lambda field, name, network: inventory.blank(inventory.text_length(network))
  )
  rewards = reward_builders.build_rewards(config, files)
  shardings = loading.reward_shardings(config, rewards, mesh)
  params = {
    name: {
      part: components.placed(c.abstract, shardings[name][part])
      for part, c in reward.components.items()
    }
    for name, reward in rewards.items()
  }
  model = taken.model._replace(rewards=rewards, reward_params=params)
  stats = next(call for call in taken.calls if call.name == "advantages").arguments[2]
  run = programs.build(config, model.pipeline, rewards, mesh, None)
  return calls.of_scores(config, model, run, media, stats, examples=400)


def rows(notes: Notes) -> list[str]:
  """The notes as rows of the table in docs/gpus.md.

  Programs with the same attention share a row.
  """
  found = defaultdict(set)
  for note in notes:
    found[note[1:]].add("update" if note.program.startswith("update ") else note.program)
  return sorted(
    f"| {', '.join(sorted(names))} | {shape.queries} | {shape.keys} | {shape.heads} x"
    f" {shape.head_dim} |"
    f" {shape.dtype} | {h100} | {a100} |"
    for (shape, h100, a100), names in found.items()
  )


def documented(title: str) -> list[str]:
  """The rows of the table below a heading of docs/gpus.md."""
  section = PAGE.read_text().split(f"### {title}\n")[1].split("\n#")[0]
  return sorted(line for line in section.splitlines() if re.match(r"\| .*\| (xla|cudnn) \|$", line))


if __name__ == "__main__":
  titles = {
    "stable_diffusion": "Stable Diffusion v1.4",
    "flux": "FLUX.1-dev",
    "hunyuan_video": "HunyuanVideo",
  }
  for family, title in titles.items():
    found = set().union(
      *(lower_group(group, devices=1) for group in groups(family, devices=1, tiny=False))
    )
    print(f"### {title}", "", *rows(found), "", sep="\n")
