"""The model: its family, its attention kernel, and the adapters of LoRA."""

import re
from collections.abc import Iterator

from ml_collections import ConfigDict

from dancegrpo_jax.pipelines.families import family_of
from dancegrpo_jax.settings.checks.values import problem


def paradigm(config: ConfigDict) -> str:
  """What the family's denoiser was trained as, "diffusion" or "flow"; "" for an unknown family."""
  try:
    return family_of(config.model.family).paradigm
  except ValueError:
    return ""


def family(config: ConfigDict) -> Iterator[str]:
  """Whether there is such a family, and it draws what it should."""
  name, frames = config.model.family, config.model.frames
  try:
    videos = family_of(name).videos
  except ValueError as error:
    yield str(error)
    return
  if frames > 1 and not videos:
    yield problem("model.frames", frames, f"{name} draws images; use 1")


def attention(
  config: ConfigDict, platform: str | None, capability: tuple[int, int]
) -> Iterator[str]:
  """Whether the devices have the attention kernel of the config; see models/attention.py.

  Args:
    config: the whole config.
    platform: cpu, gpu or tpu; None checks nothing.
    capability: compute capability of NVIDIA GPUs, (0, 0) for other devices.
  """
  field, kernel = "model.attention", config.model.get("attention")
  if kernel == "splash" and platform == "gpu":
    remedy = "is for TPUs, and this run is on a GPU; use 'auto', 'cudnn' or 'xla'"
    yield problem(field, kernel, remedy)
  if kernel != "cudnn" or platform is None:
    return
  if platform != "gpu":
    remedy = f"is for NVIDIA GPUs, and this run is on a {platform.upper()}; use 'auto' or 'xla'"
    yield problem(field, kernel, remedy)
  elif capability < (8, 0):
    major, minor = capability
    has = f"{major}.{minor}" if major else "none, as it is not NVIDIA's"
    remedy = f"needs a compute capability of 8.0; this GPU has {has}; use 'xla'"
    yield problem(field, kernel, remedy)


def lora(config: ConfigDict) -> Iterator[str]:
  """Whether rank, alpha and targets are all set, or all empty, and adapters have one start.

  Whether the targets are in the network is checked where the network is built.
  """
  section = config.lora
  if section.checkpoint and config.init_from:
    remedy = f"config.init_from = {config.init_from!r} says too where adapters start; empty one"
    yield problem("lora.checkpoint", section.checkpoint, remedy)
  try:
    re.compile(section.targets)
  except re.error as error:
    yield problem("lora.targets", section.targets, f"not a regular expression: {error}")
  if section.rank > 0:
    if section.alpha == 0:
      remedy = f"the adapters of rank {section.rank} would do nothing; use 1 to 2 times lora.rank"
      yield problem("lora.alpha", section.alpha, remedy)
    if not section.targets:
      example = r".*attn.*/to_(q|k|v|out_0)/kernel"
      remedy = f"must match the kernels to adapt, as {example!r}"
      yield problem("lora.targets", section.targets, remedy)
  elif section.rank == 0:
    for name in ("alpha", "targets", "checkpoint"):
      if section[name]:
        remedy = "needs lora.rank above 0; with rank 0 every weight is trained"
        if name == "checkpoint":
          remedy += " (to start from the file's weights, `convert merge` adds it to the base)"
        yield problem(f"lora.{name}", section[name], remedy)
