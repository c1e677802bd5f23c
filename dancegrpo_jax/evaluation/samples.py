"""Samples of a base model or a checkpoint, as PNG files."""

from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from dancegrpo_jax.assembly import cut_prompts, sampling
from dancegrpo_jax.devices import accelerator
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.report import images
from dancegrpo_jax.settings import checks
from dancegrpo_jax.types import Example


def run(
  config: ConfigDict, checkpoint: str, prompts: list[str], out: Path, samples: int, seed: int
) -> None:
  """Writes `<prompt number>_<sample number>.png` for every sample, and grid.png with captions.

  Args:
    config: of the run.
    checkpoint: "base", a workdir, or a folder of checkpoints.
    prompts: texts.
    out: the folder.
    samples: samples of each prompt.
    seed: of the initial noise.

  Raises:
    ConfigError: a mistake in the config, the number of samples, or the checkpoint.
  """
  if samples < 1:
    raise ConfigError(f"--samples={samples}: must be at least 1")
  device = jax.devices()[0]
  checks.validate(config, num_devices=jax.device_count(), **checks.device_facts(device))
  accelerator.say_share(device.platform)
  examples = [Example(i, text, config.data.negative_prompt) for i, text in enumerate(prompts)]
  with sampling.opened(config, checkpoint) as opened:
    for line in cut_prompts.lines(config, opened.limits, {"prompts": examples}):
      print(line)
    media = sampling.draw(opened, opened.weights, examples, samples, seed)
  pixels = np.asarray(media.pixels)
  for p, row in enumerate(pixels):
    for s, image in enumerate(row):
      images.save(out / f"{p:02d}_{s:02d}.png", image)
  captions = [text for text in prompts for _ in range(samples)]
  flat = pixels.reshape(-1, *pixels.shape[2:])
  images.save(out / "grid.png", images.grid(flat, samples, captions=captions))
  print(f"{len(flat)} images of {checkpoint} and grid.png: {out}")
