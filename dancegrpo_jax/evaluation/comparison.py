"""Compares samples of a checkpoint with those that its base model makes of the same noise."""

from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from dancegrpo_jax import strict_json
from dancegrpo_jax.assembly import cut_prompts, sampling
from dancegrpo_jax.compilation import automatic
from dancegrpo_jax.data import prompts
from dancegrpo_jax.devices import accelerator
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.evaluation.measures import compare, measure
from dancegrpo_jax.report import images
from dancegrpo_jax.report.progress import phase
from dancegrpo_jax.rewards import failures
from dancegrpo_jax.settings import checks
from dancegrpo_jax.types import Example, Media


def run(config: ConfigDict, checkpoint: str, files: list[str], out: Path) -> dict:
  """Samples base model and checkpoint on each prompt file, and writes scores and images.

  For `out` = x.json there are x/<prompts>.png, a grid with the base model above the checkpoint, and
  x/<prompts>/{base,checkpoint}/000.png ..., and x/reward_errors.txt where a reward has failed.

  Args:
    config: of the run.
    checkpoint: its name, see `chosen.find`, or "base".
    files: prompt files.
    out: the JSON file.

  Returns:
    `measures.compare` by the name of the prompt file.

  Raises:
    ConfigError: a mistake in the config, or a checkpoint, prompt file or reward that can't be used.
  """
  device = jax.devices()[0]
  config = automatic.resolved(config, jax.devices())
  checks.validate(config, num_devices=jax.device_count(), **checks.device_facts(device))
  accelerator.say_share(device.platform)
  try:
    found = {file: prompts.read(file, config.data.negative_prompt) for file in files}
    distractors = config.evaluation.distractors
    others = {distractors: prompts.read(distractors)} if distractors else {}
  except ValueError as error:
    raise ConfigError(str(error)) from error
  lists = {file: each.examples for file, each in found.items()}
  pool = [example for each in (others or found).values() for example in each.examples]
  for what, sources in (("prompts", found), ("captions among which retrieval searches", others)):
    for each in sources.values():
      print(f"{what}: {each.summary}")
  print(
    f"{config.evaluation.samples} samples of each prompt, of the base and of {checkpoint}, on"
    f" {jax.device_count()} {device.device_kind}, into {out}",
    flush=True,
  )
  results: dict[str, dict] = {}
  rows: dict[str, dict[str, list[dict]]] = {}
  folder = out.with_suffix("")
  errors = folder / failures.FILE
  with sampling.opened(config, checkpoint, tried=sum(lists.values(), [])) as opened:
    groups = {f"prompts of {file}": examples for file, examples in lists.items()}
    for line in cut_prompts.lines(config, opened.limits, groups):
      print(line)
    for file, examples in lists.items():
      with phase(f"{file}, base"):
        base, before = measure(opened, opened.model.trainable, examples, pool, errors)
      with phase(f"{file}, {checkpoint}"):
        tuned, after = measure(opened, opened.weights, examples, pool, errors)
      name = Path(file).stem
      results[name] = compare(base, tuned)
      images.save(folder / f"{name}.png", side_by_side(before.pixels, after.pixels, examples))
      rows[name] = {
        "base": save_samples(folder / name / "base", examples, base, before),
        "checkpoint": save_samples(folder / name / "checkpoint", examples, tuned, after),
      }
  content = {
    "checkpoint": checkpoint,
    "iteration": opened.iteration,
    "results": results,
    "samples": rows,
  }
  out.write_text(strict_json.dumps(content, indent=1) + "\n")
  print(table(results))
  return results


def save_samples(folder: Path, examples: list[Example], scores: dict, media: Media) -> list[dict]:
  """Writes the samples of one set of weights.

  Args:
    folder: for the files.
    examples: prompts.
    scores: of `measures.measure`.
    media: of pixels `[prompts, samples, (frames,) height, width, 3]`.

  Returns:
    For each sample its prompt, its file, and its scores, None for a failed one.
  """
  pixels, count = media.pixels, media.pixels.shape[1]
  files = images.save_samples(folder, pixels.reshape(-1, *pixels.shape[2:]), media.fps)
  flat = {term: np.ravel(values) for term, values in scores.items() if np.ndim(values)}
  rows: list[dict] = []
  for i, file in enumerate(files):
    prompt = examples[i // count].prompt
    row: dict = {"prompt": prompt, "file": str(file.relative_to(folder.parents[2]))}
    for term, values in flat.items():
      row[term] = float(values[i]) if np.isfinite(values[i]) else None
    rows.append(row)
  return rows


def table(results: dict) -> str:
  """The comparison as the text that the command prints."""
  lines = [
    f"{'prompts':<28} {'score':<16} {'base':>8} {'trained':>8} {'change':>8}   95 % interval"
  ]
  for name, rows in results.items():
    for term, row in rows.items():
      interval = f"[{row['low']:+.4f}, {row['high']:+.4f}]" if "low" in row else ""
      failed = f"   {row['failed']} failed" if row.get("failed") else ""
      lines.append(
        f"{name:<28} {term:<16} {row['base']:8.4f} {row['checkpoint']:8.4f}"
        f" {row['difference']:+8.4f}   {interval}{failed}"
      )
  return "\n".join(lines)


def side_by_side(
  before: np.ndarray,
  after: np.ndarray,
  examples: list[Example],
  columns: int = 8,
  most: int = 16,
) -> Image.Image:
  """A grid of the first sample of each prompt, the base model's above the checkpoint's.

  Args:
    before, after: samples of base model and checkpoint, `[prompts, samples, (frames,) height,
      width, 3]`.
    examples: prompts.
    columns: prompts in a row.
    most: prompts in the grid; the first ones are shown.
  """
  tiles: list[np.ndarray] = []
  captions: list[str] = []
  count = min(most, len(examples))
  for start in range(0, count, columns):
    row = range(start, min(start + columns, count))
    blank = columns - len(row)
    for name, pixels in (("base", before), ("trained", after)):
      tiles += [pixels[p, 0] for p in row] + [np.ones_like(pixels[0, 0])] * blank
      captions += [f"{name}: {examples[p].prompt}" for p in row] + [""] * blank
  return images.grid(np.stack(tiles), columns, captions=captions)
