"""Values that cross rooms and belong to no single one of them. All of them are pytrees."""

import dataclasses
from typing import Any, NamedTuple

import jax

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
    image: path of the picture that a video begins with, else None.
    metadata: anything a reward wants (an answer, a tag list).
  """

  id: int
  prompt: str
  negative_prompt: str = ""
  image: str | None = None
  metadata: dict | None = None


class Conditioning(NamedTuple):
  """What a denoiser is conditioned on: opaque pytrees with one row a prompt.

  Rows are gathered by prompt index where they are used, so that a group of G samples holds one
  copy.
  """

  positive: PyTree
  negative: PyTree | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Media:
  """Decoded samples.

  Attributes:
    pixels: `[batch, (frames,) height, width, 3]` in [0, 1], of JAX or NumPy; images have no frames
      axis. Abstract where programs are only compiled.
    fps: frames a second, None for images. It is part of the tree's structure and not a leaf, so
      that a compiled program knows it.
  """

  pixels: Any
  fps: float | None = dataclasses.field(default=None, metadata={"static": True})
