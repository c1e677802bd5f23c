"""Types that several rooms of the package exchange. All of them are pytrees."""

import dataclasses
from typing import Any, NamedTuple

import jax

PyTree = Any

# The mesh axes that samples are split over; fsdp is the major one. XLA's partitioner (jaxlib
# 0.10.2) computes wrong gradients of kernels that are split over the minor one of them and tensor.
# So fsdp must not be the minor one (tests/test_mesh.py), and rules with data are rejected.
SAMPLE_AXES = ("fsdp", "data")


class Example(NamedTuple):
  """One row of a prompt data set.

  Attributes:
    id: the position in the data set. The noise of the samples depends on it and on the seed.
    prompt: the text.
    negative_prompt: the text of the unconditional branch of classifier-free guidance.
    image: the path of the picture that a video begins with, or None.
    metadata: values for the rewards, for example an answer or a list of tags.
  """

  id: int
  prompt: str
  negative_prompt: str = ""
  image: str | None = None
  metadata: dict | None = None


class Conditioning(NamedTuple):
  """The conditioning of a denoiser: pytrees with one row a prompt, of any structure.

  Rows are gathered by the index of the prompt where they are used, so that a group of G samples
  needs one copy.
  """

  positive: PyTree
  negative: PyTree | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Media:
  """Decoded samples.

  Attributes:
    pixels: `[batch, (frames,) height, width, 3]` in [0, 1], an array of JAX or NumPy. Images have
      no axis of frames. Where programs are only compiled, the array is abstract.
    fps: frames a second; None for images. It is part of the tree's structure and not a leaf, so
      that a compiled program knows it.
  """

  pixels: Any
  fps: float | None = dataclasses.field(default=None, metadata={"static": True})
