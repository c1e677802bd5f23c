"""Samples of a base model or a checkpoint, as files."""

import contextlib
import json
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from dancegrpo_jax.assembly import cut_prompts, sampling
from dancegrpo_jax.compilation import automatic
from dancegrpo_jax.data import prompts
from dancegrpo_jax.devices import accelerator
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.report import clips, images
from dancegrpo_jax.settings import checks
from dancegrpo_jax.types import Example

LIST = "samples.jsonl"
_ROWS, _COLUMNS = 16, 8  # of the grid, at most
_PIXELS = 2**25  # of the samples in the grid, at most; but it always has one row


def run(
  config: ConfigDict,
  checkpoint: str,
  texts: list[str],
  files: list[str],
  out: Path,
  samples: int,
  seed: int,
) -> None:
  """Writes a file for every sample, grid.png with the first of them and their captions, and
  samples.jsonl.

  A file is called <number of the prompt>_<number of the sample>.png. A clip is an animated .webp,
  and an .mp4 beside it where imageio-ffmpeg is installed. A line of samples.jsonl has the name of
  the file, the prompt, the seed and the number of the sample. The samples are drawn and written
  chunk by chunk.

  Args:
    config: of the run.
    checkpoint: its name, see `chosen.find`, or "base".
    texts: prompts.
    files: prompts files, whose prompts follow.
    out: the folder.
    samples: samples of each prompt, at least 1.
    seed: of the initial noise.

  Raises:
    ConfigError: a mistake in the config or a prompts file, or a checkpoint that can't be used.
  """
  device = jax.devices()[0]
  config = automatic.resolved(config, jax.devices())
  checks.validate(config, num_devices=jax.device_count(), **checks.device_facts(device))
  accelerator.say_share(device.platform)
  examples = read(config, texts, files)
  tiles: list[np.ndarray] = []
  columns = min(samples, _COLUMNS)
  print(
    f"samples: {samples} of each prompt (prompts: {len(examples)}), of {checkpoint}, on"
    f" {jax.device_count()} {device.device_kind}, into {out}",
    flush=True,
  )
  with sampling.opened(config, checkpoint) as opened:
    height, width = opened.model.pipeline.sample_shape[-3:-1]
    rows = min(len(examples), _ROWS, max(1, _PIXELS // (columns * height * width)))
    for line in cut_prompts.lines(config, opened.limits, {"prompts": examples}):
      print(line)
    with contextlib.ExitStack() as stack:
      listed = None
      for part in sampling.parts(opened, opened.weights, examples, samples, seed):
        if listed is None:  # nothing is written where the first samples fail
          out.mkdir(parents=True, exist_ok=True)
          listed = stack.enter_context((out / LIST).open("w"))
        for number, pixels in zip(part.numbers, part.media.pixels):
          p, s = divmod(number, samples)
          stem = f"{_number(p, len(examples))}_{_number(s, samples)}"
          file = images.save_sample(out / stem, pixels, part.media.fps)
          if part.media.fps is not None:
            clips.save_mp4(out / f"{stem}.mp4", images.to_uint8(pixels), part.media.fps)
          listed.write(_line(file.name, examples[p], seed, s))
          if p < rows and s < columns:
            tiles.append(pixels)
        listed.flush()
  captions = [example.prompt for example in examples[:rows] for _ in range(columns)]
  images.save(out / "grid.png", images.grid(np.stack(tiles), columns, captions=captions))
  total = len(examples) * samples
  shown = "" if len(tiles) == total else f" (the first {rows} prompts, {columns} samples of each)"
  kind = "images" if len(tiles[0].shape) == 3 else "clips"
  print(f"{total} {kind} of {checkpoint}, {LIST} and grid.png{shown}: {out}")


def read(config: ConfigDict, texts: list[str], files: list[str]) -> list[Example]:
  """The prompts, numbered from 0. Prints a line about each file.

  Raises:
    ConfigError: a file can't be used, or there is no prompt.
  """
  examples = [Example(0, text, config.data.negative_prompt) for text in texts]
  for file in files:
    try:
      found = prompts.read(file, config.data.negative_prompt)
    except ValueError as error:
      raise ConfigError(f"--prompts={file}: {error}") from error
    print(f"prompts: {found.summary}")
    examples += found.examples
  if not examples:
    raise ConfigError(f"--prompts={', '.join(files)}: there is no prompt in it")
  return [example._replace(id=number) for number, example in enumerate(examples)]


def _number(number: int, count: int) -> str:
  """A number with as many digits, two at least, as the last of `count` has."""
  return f"{number:0{max(2, len(str(count - 1)))}d}"


def _line(file: str, example: Example, seed: int, number: int) -> str:
  row = {"file": file, "prompt": example.prompt, "seed": seed, "number": number}
  if example.negative_prompt:
    row["negative_prompt"] = example.negative_prompt
  return json.dumps(row, ensure_ascii=False) + "\n"
