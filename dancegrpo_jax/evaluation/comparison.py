"""A checkpoint beside its base model: samples of both on the same noise, scored, stored and
told.
"""

import json
from pathlib import Path

import jax
import numpy as np

from dancegrpo_jax.assembly import sampling
from dancegrpo_jax.data import prompts
from dancegrpo_jax.devices import accelerator
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.evaluation.measures import compare, measure
from dancegrpo_jax.report import images
from dancegrpo_jax.settings import checks


def run(config, checkpoint: str, files: list[str], out: Path) -> dict:
  """Samples base and checkpoint on each prompt file with the same noise; writes JSON, the images
  and grids of them.

  Beside `out` = x.json: x/<prompts>.png, base above checkpoint, and
  x/<prompts>/{base,checkpoint}/000.png ...

  Raises:
    ConfigError: a checkpoint or prompt file that can't be used.
  """

  device = jax.devices()[0]
  facts = checks.device_facts(device)
  checks.validate(config, num_devices=jax.device_count(), **facts)
  accelerator.say_share(device.platform)
  try:
    lists = {file: prompts.read_prompts(file, config.data.negative_prompt) for file in files}
    pool = (
      prompts.read_prompts(config.evaluation.distractors)
      if config.evaluation.distractors
      else sum(lists.values(), [])
    )
  except ValueError as error:
    raise ConfigError(str(error)) from error
  results, rows, folder = {}, {}, out.with_suffix("")
  with sampling.opened(config, checkpoint) as opened:
    for file, examples in lists.items():
      base, before = measure(opened, opened.model.trainable, examples, pool)
      tuned, after = measure(opened, opened.weights, examples, pool)
      name = Path(file).stem
      results[name] = compare(base, tuned)
      images.save(folder / f"{name}.png", side_by_side(before, after, examples))
      rows[name] = {
        "base": keep(folder / name / "base", examples, base, before),
        "checkpoint": keep(folder / name / "checkpoint", examples, tuned, after),
      }
  out.write_text(
    json.dumps({"checkpoint": checkpoint, "results": results, "samples": rows}, indent=1) + "\n"
  )
  print(table(results))
  return results


def keep(folder: Path, examples: list, scores: dict, pixels: np.ndarray) -> list[dict]:
  """Writes every image of one set of weights; a row each with prompt, file and scores (None where
  one failed).
  """

  count = pixels.shape[1]
  files = images.save_images(folder, pixels.reshape(-1, *pixels.shape[2:]))
  each = {term: np.ravel(values) for term, values in scores.items() if np.ndim(values)}
  return [
    {"prompt": examples[i // count].prompt, "file": str(file.relative_to(folder.parents[2]))}
    | {term: float(values[i]) if np.isfinite(values[i]) else None for term, values in each.items()}
    for i, file in enumerate(files)
  ]


def table(results: dict) -> str:
  """The comparison for people."""
  lines = [
    f"{'prompts':<28} {'score':<16} {'base':>8} {'trained':>8} {'change':>8}   95 % interval"
  ]
  for name, rows in results.items():
    for term, row in rows.items():
      interval = f"[{row['low']:+.4f}, {row['high']:+.4f}]" if "low" in row else ""
      lines.append(
        f"{name:<28} {term:<16} {row['base']:8.4f} {row['checkpoint']:8.4f}"
        f" {row['difference']:+8.4f}   {interval}"
      )
  return "\n".join(lines)


def side_by_side(
  before: np.ndarray, after: np.ndarray, examples: list, columns: int = 8, most: int = 16
):
  """A grid of the first sample of the first prompts: a row of the base model's, the checkpoint's
  below it. A PIL image.
  """

  tiles, captions = [], []
  for start in range(0, min(most, len(examples)), columns):
    rows = range(start, min(start + columns, most, len(examples)))
    for name, pixels in (("base", before), ("trained", after)):
      tiles += [pixels[p, 0] for p in rows] + [np.ones_like(pixels[0, 0])] * (columns - len(rows))
      captions += [f"{name}: {examples[p].prompt}" for p in rows] + [""] * (columns - len(rows))
  return images.grid(np.stack(tiles), columns, captions=captions)
