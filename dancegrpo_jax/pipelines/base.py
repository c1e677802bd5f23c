"""What a model family offers to the rest: a `Pipeline` of pure functions, and how to build one."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from ml_collections import ConfigDict

from dancegrpo_jax.diffusion.schedules import Schedule
from dancegrpo_jax.models.lora import COLLECTION, Lora, abstract
from dancegrpo_jax.pipelines.layout import (
  STEMS,
  Component,
  Layout,
  Network,
  TokenizerKind,
  layout_of,
)
from dancegrpo_jax.types import Example, Media, PyTree


class Pipeline(NamedTuple):
  """A generator. `params` below is a dict of trees by component, as denoiser and decoder.

  Attributes:
    prepare: host function, `(examples) -> inputs`: what `encode` reads of prompts, and of pictures
      where there are any; a pytree of NumPy arrays with one row an example. It gets blank examples
      too (prompt ""), from whose shapes programs are compiled.
    encode: `(params, inputs) -> rows`, a pytree with one row an example, as `denoise` takes it.
    denoise: `(params, x [b, ...], model_time [b], rows) -> output [b, ...]`.
    decode: `(params, latents [b, ...]) -> Media` of b samples.
    schedule: `(steps, shift) -> Schedule`; the shift is rectified flow's, 0 = the checkpoint's own.
    prediction: "epsilon", "v" or "velocity".
    latent_shape: of one sample.
    sample_shape: of one decoded sample: (height, width, 3), or (frames, height, width, 3).
    components: what `params` consists of; the network that is trained is called "denoiser".
    trainable: what is trained: a component, or "lora".
    encoders: the components that `encode` alone reads.
    adapters: where "lora" is trained, the abstract tree that `params` then may hold beside the
      components; else None.
  """

  prepare: Callable[[list[Example]], PyTree]
  encode: Callable[[PyTree, Any], PyTree]
  denoise: Callable[[PyTree, Any, Any, PyTree], Any]
  decode: Callable[[PyTree, Any], Media]
  schedule: Callable[[int, float], Schedule]
  prediction: str
  latent_shape: tuple[int, ...]
  sample_shape: tuple[int, ...]
  components: dict[str, Component]
  trainable: str = "denoiser"
  encoders: tuple[str, ...] = ("text_encoder",)
  adapters: PyTree | None = None


class ModelSettings(NamedTuple):
  """How a family's networks are built; the fields are those of the config's model section.

  Attributes:
    size: height and width of the samples, pixels.
    dtype: what the denoiser computes in; its parameters are float32 where they are trained.
    frozen_dtype: of the other networks, stored and computed; under adapters of the denoiser's
      parameters too.
    remat: recompute the denoiser's blocks in the backward pass.
    attention: see `models.attention.attention`.
    scan_blocks: stack the weights of equal blocks.
    lora: adapters to train in place of the denoiser's parameters, or None.
  """

  size: tuple[int, int]
  dtype: str
  frozen_dtype: str
  remat: bool = False
  attention: str = "auto"
  scan_blocks: bool = False
  lora: Lora | None = None

  @property
  def stored(self) -> Any:
    """The dtype of the denoiser's parameters."""
    return jnp.dtype(self.frozen_dtype if self.lora else "float32")


def no_options(config: ConfigDict) -> dict[str, Any]:
  """For families that read nothing of the config but `ModelSettings`."""
  del config
  return {}


class Family(NamedTuple):
  """A model family. pipelines/families.py lists those of this package; a config may name another
  one as "module:object".

  Attributes:
    files: JSON files of its checkpoints, by the key under which `build` gets them.
    tokenizers: the kind of each tokenizer's folder: a name in `data.tokenizers.KINDS`, or a
      `TokenizerKind`.
    paradigm: what its denoiser was trained as: "diffusion" or "flow" (rectified flow).
    build: `(jsons, tokenizers by folder, settings, **options) -> Pipeline`. ValueError where a file
      or a setting asks for what is not implemented.
    networks: its networks by their class in PyTorch.
    options: `(config) -> keyword arguments` of `build` beside the common settings.
    text_length: `(jsons) -> tokens` of its texts, for plans of checkpoints without tokenizers.
    index_file: `layout.INDEX` where its checkpoints are diffusers pipelines; "" for a layout of its
      own.
  """

  files: dict[str, str]
  tokenizers: dict[str, str | TokenizerKind]
  paradigm: str
  build: Callable[..., Pipeline]
  networks: dict[str, Network]
  options: Callable[[ConfigDict], dict[str, Any]] = no_options
  text_length: Callable[[dict[str, dict]], int] = lambda jsons: 77
  index_file: str = ""

  @property
  def layout(self) -> Layout:
    """The files of its checkpoints."""
    stems = dict.fromkeys(network.table.file for network in self.networks.values())
    layout = layout_of(self.files, self.tokenizers)
    return layout._replace(index_file=self.index_file, stems=tuple(stems) or STEMS)


def adapted(pipeline: Pipeline, settings: Lora | None) -> Pipeline:
  """The pipeline with its denoiser frozen under trained adapters; unchanged without settings.

  Raises:
    ValueError: as `lora.chosen`.
  """
  if settings is None:
    return pipeline
  adapters = abstract(pipeline.components["denoiser"].abstract, settings)
  return pipeline._replace(trainable=COLLECTION, adapters=adapters)


def text_inputs(
  tokenize: Callable[[list[str]], PyTree],
) -> Callable[[list[Example]], PyTree]:
  """`Pipeline.prepare` of a model that reads prompts alone."""
  return lambda examples: tokenize([example.prompt for example in examples])
