"""Command: images from a base model or a checkpoint.

    python -m dancegrpo_jax.sample --config=configs/emoji_clip.py --checkpoint=base \\
      --prompt="a red apple on a blue background" --out=out/
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from dancegrpo_jax.devices import accelerator
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.settings import command_line


def add_flags(parser: argparse.ArgumentParser) -> None:
  """The flags of this command."""
  parser.add_argument(
    "--checkpoint", default="base", help="base, a workdir, or its checkpoints/ folder"
  )
  parser.add_argument("--prompt", action="append", required=True, help="may be given several times")
  parser.add_argument("--out", required=True, help="folder for the PNG files and grid.png")
  parser.add_argument("--samples", type=int, default=4, help="images a prompt")
  parser.add_argument("--seed", type=int, default=0, help="of the initial noise")


def run(config, checkpoint: str, prompts: list[str], out: Path, samples: int, seed: int) -> None:
  """Writes `<prompt number>_<sample number>.png` for every image, and a captioned grid.

  Raises:
    ConfigError: a checkpoint or folder that can't be used.
  """
  import jax

  from dancegrpo_jax.assembly import sampling
  from dancegrpo_jax.report import images
  from dancegrpo_jax.settings import checks
  from dancegrpo_jax.types import Example

  if samples < 1:
    raise ConfigError(f"--samples={samples}: must be at least 1")
  device = jax.devices()[0]
  facts = checks.device_facts(device)
  checks.validate(config, num_devices=jax.device_count(), **facts)
  accelerator.say_share(device.platform)
  with sampling.opened(config, checkpoint) as opened:
    examples = [Example(i, text, config.data.negative_prompt) for i, text in enumerate(prompts)]
    media = sampling.draw(opened, opened.weights, examples, samples, seed)
  pixels = np.asarray(media.pixels)
  out.mkdir(parents=True, exist_ok=True)
  for p, row in enumerate(pixels):
    for s, image in enumerate(row):
      images.save(out / f"{p:02d}_{s:02d}.png", image)
  captions = [text for text in prompts for _ in range(samples)]
  images.save(
    out / "grid.png", images.grid(pixels.reshape(-1, *pixels.shape[2:]), samples, captions=captions)
  )
  print(f"{np.prod(pixels.shape[:2])} images of {checkpoint} and grid.png: {out}")


def main(argv: list[str]) -> int:
  """Reads the flags and samples; returns the exit code, 2 for a mistake."""

  def command() -> None:
    line = command_line.parse_argv(
      argv, "Sample images from a base model or a checkpoint.", add_flags
    )
    accelerator.start()
    flags = line.flags
    command_line.require_writable(f"--out={flags.out}", Path(flags.out))
    run(line.config, flags.checkpoint, flags.prompt, Path(flags.out), flags.samples, flags.seed)

  return command_line.exit_on_mistake(command)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
