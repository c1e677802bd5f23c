"""Values that cross rooms and belong to no single one of them.

All are NamedTuples: they are pytrees, they cost nothing, and `jax.tree.map` rebuilds them without
running checks.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float

PyTree = Any

# The mesh axes that samples are split over, fsdp the major one. XLA's partitioner (jaxlib 0.10.2)
# gets gradients wrong of kernels that lie over the minor one of them and tensor: fsdp must not be
# it (tests/test_mesh.py), and rules with data are refused.
SAMPLE_AXES = ("fsdp", "data")


class Example(NamedTuple):
  """One row of a prompt data set.

  Attributes:
    id: position in the data set; with the seed it names the sample's noise.
    prompt: the text.
    negative_prompt: text of the unconditional branch of classifier-free guidance.
    image: reference frame `[height, width, 3]` in [0, 1] for image-to-video, else None.
    metadata: anything a reward wants (an answer, a tag list).
  """

  id: int
  prompt: str
  negative_prompt: str = ""
  image: np.ndarray | None = None
  metadata: dict | None = None


class Conditioning(NamedTuple):
  """What a denoiser is conditioned on: opaque pytrees with one row a prompt.

  Rows are gathered by prompt index where they are used, so that a group of G samples holds one
  copy.
  """

  positive: PyTree
  negative: PyTree | None


class Media(NamedTuple):
  """Decoded samples: `pixels` is `[batch, (frames,) height, width, 3]` in [0, 1]; `fps` is None for
  images.
  """

  pixels: Float[Array, "batch *space 3"]
  fps: float | None = None
