"""The TFDS builder of a part of a run's prompt embeddings, which writes ArrayRecord files and
doesn't need TensorFlow.

It has a folder of its own because TFDS looks for a builder's metadata beside its module.
"""

from collections.abc import Callable

import numpy as np
import tensorflow_datasets as tfds

from dancegrpo_jax.data.prompt_embeddings import Leaf


class PromptEmbeddings(tfds.core.GeneratorBasedBuilder):
  """Prompts and their embeddings by a text encoder. TFDS moves the files to their place when they
  are complete.
  """

  name = "prompt_embeddings"
  VERSION = tfds.core.Version("1.0.0")
  RELEASE_NOTES = {"1.0.0": "Arrays as bytes."}

  def __init__(
    self,
    *,
    leaves: dict[str, Leaf],
    texts: list[str],
    encode: Callable[[list[str]], dict] | None,
    file_format="array_record",
    **kwargs,
  ):
    """`encode` turns texts into host arrays `[n, ...]`, by the names of `leaves`. It is not called
    for a part that is there, and may then be None.
    """
    self.leaves, self.texts, self.encode = leaves, texts, encode
    super().__init__(file_format=file_format, **kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    def stored(leaf: Leaf):  # as bytes, since TFDS has no bfloat16 without TensorFlow
      shape = (int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize,)
      return tfds.features.Tensor(
        shape=shape, dtype=np.uint8, encoding=tfds.features.Encoding.BYTES
      )

    features = {name: stored(leaf) for name, leaf in self.leaves.items()}
    return tfds.core.DatasetInfo(
      builder=self,
      description=PromptEmbeddings.__doc__,
      features=tfds.features.FeaturesDict({"prompt": tfds.features.Text(), **features}),
      disable_shuffling=True,  # so that rows stay in the prompts' order
    )

  def _split_generators(self, dl_manager) -> dict:
    del dl_manager  # nothing is downloaded
    return {"train": self._generate_examples()}

  def _generate_examples(self):
    assert self.encode is not None  # This is called only for parts that are not there.
    arrays = self.encode(self.texts)
    for i, text in enumerate(self.texts):
      rows = {
        name: np.frombuffer(np.ascontiguousarray(arrays[name][i]).tobytes(), np.uint8)
        for name in self.leaves
      }
      yield i, {"prompt": text, **rows}
