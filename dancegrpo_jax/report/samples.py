"""Reads what a run has saved under `samples/`."""

from pathlib import Path
from typing import NamedTuple

from dancegrpo_jax.report import files, images


class Evaluation(NamedTuple):
  """An evaluation inside training. A score that failed is None.

  Attributes:
    iteration: number of iterations that were done; 0 is the base model.
    pictures: by prompt.
    prompts: the fixed prompts.
    scores: of the fixed prompts.
    held_out: scores of prompts that are never trained on.
  """

  iteration: int
  pictures: list[Path]
  prompts: list[str]
  scores: list[float | None]
  held_out: list[float | None]


class Extremes(NamedTuple):
  """The best and the worst sample of the first prompt of an iteration.

  Attributes:
    iteration: number of iterations that were done with it.
    files: {"best": its picture or video, "worst": the other one}.
    prompt: of both.
    scores: {"best": score, "worst": score}.
    rewards: of all samples of the iteration, or evenly spaced ones of them in order.
  """

  iteration: int
  files: dict[str, Path]
  prompt: str
  scores: dict[str, float | None]
  rewards: list[float]


def evaluations(workdir: Path) -> list[Evaluation]:
  """The complete evaluations, by iteration."""
  found = []
  for file in (workdir / "samples").glob("iteration_*/prompts.json"):
    saved = files.read_json(file)
    found.append(
      Evaluation(
        iteration=_iteration(file.parent),
        pictures=images.saved(file.parent),
        prompts=saved["prompts"],
        scores=saved["scores"],
        held_out=saved.get("held_out", []),
      )
    )
  return sorted(found, key=lambda evaluation: evaluation.iteration)


def extremes(workdir: Path) -> list[Extremes]:
  """The saved pairs, by iteration."""
  found = []
  for file in (workdir / "samples").glob("extremes_*/scores.json"):
    saved = files.read_json(file)
    found.append(
      Extremes(
        iteration=_iteration(file.parent),
        files={path.stem: path for path in images.saved(file.parent)},
        prompt=saved["prompt"],
        scores={name: saved[name] for name in ("best", "worst")},
        rewards=saved.get("rewards", []),
      )
    )
  return sorted(found, key=lambda pair: pair.iteration)


def _iteration(folder: Path) -> int:
  """The iteration in a folder's name."""
  return int(folder.name.rpartition("_")[2])
