"""Command: scores of a checkpoint next to its base model's, on prompts with noise that training
never saw.

    python -m dancegrpo_jax.evaluate --config=configs/emoji_clip.py --checkpoint=runs/emoji_clip \\
      --out=runs/emoji_clip/evaluation.json
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from dancegrpo_jax.devices import accelerator
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.settings import command_line


def add_flags(parser: argparse.ArgumentParser) -> None:
  """The flags of this command."""
  parser.add_argument(
    "--checkpoint", required=True, help="a workdir, its checkpoints/ folder, or base"
  )
  parser.add_argument(
    "--prompts", action="append", help="prompt files; default: data.prompts and data.held_out"
  )
  parser.add_argument(
    "--out", required=True, help="JSON file; a folder of its name gets the images"
  )


def bootstrap(values: np.ndarray, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
  """95 % interval of the mean by resampling prompts (rows), which are what varies independently.

  Args:
    values: `[prompts, samples]`; NaN is left out.
    draws: resamples.
    seed: of the resampling.
  """
  rows = np.nanmean(values, axis=1)
  picks = np.random.default_rng(seed).integers(len(rows), size=(draws, len(rows)))
  low, high = np.nanpercentile(rows[picks].mean(1), [2.5, 97.5])
  return float(low), float(high)


def diversity(embeddings: np.ndarray) -> float:
  """Mean pairwise cosine distance within groups of two samples or more, `[prompts, samples, d]` of
  length 1.
  """
  samples = embeddings.shape[1]
  products = np.einsum("psd,ptd->pst", embeddings, embeddings)
  return float(1 - (products.sum((1, 2)) - samples).mean() / (samples * (samples - 1)))


def top1(embeddings: np.ndarray, candidates: np.ndarray) -> np.ndarray:
  """Whether each image is nearest to its own caption, `[prompts, samples]`; row p of `candidates`
  is prompt p's.
  """
  return (embeddings @ candidates.T).argmax(-1) == np.arange(len(embeddings))[:, None]


def candidate_prompts(prompts: list, pool: list, count: int) -> list:
  """The prompts themselves, then others from the pool (evenly spread, so that they are not all
  alike), `count` in all.
  """
  own = {example.prompt for example in prompts}
  others = [example for example in pool if example.prompt not in own]
  wanted = max(0, min(count - len(prompts), len(others)))
  spread = [others[i * len(others) // wanted] for i in range(wanted)]
  return list(prompts) + spread


def measure(opened, weights, examples: list, pool: list) -> tuple[dict, np.ndarray]:
  """Scores of all samples of one set of weights on one prompt list; `pool` holds the captions to
  tell an image's own from.

  Returns:
    ({term: `[prompts, samples]`}, pixels); "<reward>/retrieval" and "<reward>/diversity" too where
    it has an image embedding.
  """
  from dancegrpo_jax import programs, scoring
  from dancegrpo_jax.assembly import sampling
  from dancegrpo_jax.devices import out_of_memory

  config, model, run = opened.config, opened.model, opened.programs
  samples = config.evaluation.samples
  pixels = sampling.images(opened, weights, examples, samples, config.evaluation.seed)
  flat = pixels.reshape(-1, *pixels.shape[2:])
  texts = candidate_prompts(examples, pool, config.evaluation.candidates)
  rewards, params = model.rewards, model.reward_params
  features = scoring.reward_features(rewards, params, run.features, texts, len(texts))
  owners = np.arange(len(flat), dtype=np.int32) // samples
  rows = scoring.chunks(len(flat), config.rollout.chunk, config.mesh.lanes)
  scores = scoring.score_all(rewards, params, run.score, flat, features, owners, examples, rows)
  result = {term: values.reshape(len(examples), samples) for term, values in scores.items()}
  for name, reward in rewards.items():
    if reward.embed is not None:
      embed = out_of_memory.Guarded(f"embed {name}", programs.embed(config, reward))
      parts = [np.asarray(embed(params[name], flat[row])) for row in rows]
      embeddings = np.concatenate(parts)[: len(flat)].reshape(len(examples), samples, -1)
      result[f"{name}/retrieval"] = top1(embeddings, np.asarray(features[name])).astype(np.float32)
      if samples > 1:
        result[f"{name}/diversity"] = diversity(embeddings)
  return result, pixels


def compare(base: dict, tuned: dict) -> dict:
  """Means, and the difference with its bootstrap interval, by term."""
  rows = {}
  for term, before in base.items():
    after = tuned[term]
    if np.ndim(before) == 0:
      rows[term] = {"base": before, "checkpoint": after, "difference": after - before}
      continue
    low, high = bootstrap(after - before)
    rows[term] = {
      "base": float(np.nanmean(before)),
      "checkpoint": float(np.nanmean(after)),
      "difference": float(np.nanmean(after - before)),
      "low": low,
      "high": high,
    }
  return rows


def keep(folder: Path, examples: list, scores: dict, pixels: np.ndarray) -> list[dict]:
  """Writes every image of one set of weights; a row each with prompt, file and scores (None where
  one failed).
  """
  from dancegrpo_jax.report import images

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
  from dancegrpo_jax.report import images

  tiles, captions = [], []
  for start in range(0, min(most, len(examples)), columns):
    rows = range(start, min(start + columns, most, len(examples)))
    for name, pixels in (("base", before), ("trained", after)):
      tiles += [pixels[p, 0] for p in rows] + [np.ones_like(pixels[0, 0])] * (columns - len(rows))
      captions += [f"{name}: {examples[p].prompt}" for p in rows] + [""] * (columns - len(rows))
  return images.grid(np.stack(tiles), columns, captions=captions)


def run(config, checkpoint: str, files: list[str], out: Path) -> dict:
  """Samples base and checkpoint on each prompt file with the same noise; writes JSON, the images
  and grids of them.

  Beside `out` = x.json: x/<prompts>.png, base above checkpoint, and
  x/<prompts>/{base,checkpoint}/000.png ...

  Raises:
    ConfigError: a checkpoint or prompt file that can't be used.
  """
  import jax

  from dancegrpo_jax.assembly import sampling
  from dancegrpo_jax.data import prompts
  from dancegrpo_jax.report import images
  from dancegrpo_jax.settings import checks

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


def main(argv: list[str]) -> int:
  """Reads the flags and evaluates; returns the exit code, 2 for a mistake."""

  def command() -> None:
    line = command_line.parse_argv(argv, "Score a checkpoint next to its base model.", add_flags)
    accelerator.start()
    if Path(line.flags.out).suffix != ".json":
      raise ConfigError(
        f"--out={line.flags.out}: must end with .json; the images go into the folder of that"
        " name without it"
      )
    command_line.require_writable(f"--out={line.flags.out}", Path(line.flags.out).parent)
    files = line.flags.prompts or [
      file for file in (line.config.data.prompts, line.config.data.held_out) if file
    ]
    run(line.config, line.flags.checkpoint, files, Path(line.flags.out))

  return command_line.exit_on_mistake(command)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
