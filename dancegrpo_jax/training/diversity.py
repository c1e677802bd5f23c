"""How far the samples of a prompt lie apart, measured on pixels that are on the host anyway."""

from collections import defaultdict
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

METRIC = "samples/diversity"
_SIZE = 32  # pixels, to which samples are reduced: fine noise is no diversity


def reduced(pixels: Float[np.ndarray, "n *frames h w 3"]) -> np.ndarray:
  """Samples whose height and width are made at least 32 and less than 64 pixels, by means over
  squares; smaller ones stay as they are.
  """
  height, width = pixels.shape[-3:-1]
  side = max(1, min(height, width) // _SIZE)
  rows, columns = height // side, width // side
  cut = pixels[..., : rows * side, : columns * side, :]
  squares = cut.reshape(*pixels.shape[:-3], rows, side, columns, side, pixels.shape[-1])
  return squares.mean((-4, -2), dtype=np.float32)


def within_groups(samples: Mapping[int, np.ndarray], group: int) -> float:
  """The mean distance of two samples of a prompt: the root of the mean squared difference of their
  pixels.

  Args:
    samples: by number; sample b belongs to prompt b // group. There need not be all.
    group: samples of a prompt.

  Returns:
    A number between 0, where all samples of a prompt are alike, and 1. It is the mean of the
    prompts; NaN where no prompt has two samples.
  """
  by_prompt: dict[int, list[np.ndarray]] = defaultdict(list)
  for number, sample in samples.items():
    by_prompt[number // group].append(np.ravel(sample))
  means = [_mean_distance(np.stack(rows)) for rows in by_prompt.values() if len(rows) > 1]
  return float(np.mean(means)) if means else float("nan")


def _mean_distance(rows: Float[np.ndarray, "n d"]) -> float:
  """The mean over all pairs of two rows."""
  total = sum(
    float(np.sqrt(((rows[i + 1 :] - row) ** 2).mean(1)).sum()) for i, row in enumerate(rows[:-1])
  )
  return total / (len(rows) * (len(rows) - 1) / 2)
