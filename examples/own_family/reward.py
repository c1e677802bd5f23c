"""The reward of the example: how much of the picture has the colour that the prompt names."""

import numpy as np

from .pictures import COLOURS

NEAR = 0.25  # by how much each channel of a pixel may differ from the named colour


def share_of_named_colour(
  pixels: np.ndarray, prompts: list[str], metadata: list[dict | None]
) -> np.ndarray:
  """Shares of the pixels `[b, h, w, 3]` that are near the named colour; NaN where a prompt names
  none.
  """
  del metadata
  scores = np.full(len(prompts), np.nan, np.float32)
  for i, (picture, prompt) in enumerate(zip(pixels, prompts, strict=True)):
    named = [COLOURS[word] for word in prompt.lower().split() if word in COLOURS]
    if named:
      scores[i] = (np.abs(picture - np.array(named[0])) < NEAR).all(-1).mean()
  return scores
