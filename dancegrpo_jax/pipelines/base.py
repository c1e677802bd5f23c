"""The interface of a model family: pure functions in a `Pipeline`, which its `Family` builds."""

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
  """A generator. `params` below is a dict of trees by component, such as denoiser and decoder.

  Attributes:
    prepare: a function on the host, `(examples) -> inputs`. It turns prompts, and pictures where
      there are any, into the inputs of `encode`: a pytree of NumPy arrays with one row an example.
      It gets blank examples too (prompt ""), from whose shapes programs are compiled.
    encode: `(params, inputs) -> rows`, the conditioning of `denoise`: a pytree with one row an
      example.
    denoise: `(params, x [b, ...], model_time [b], rows) -> output [b, ...]`.
    decode: `(params, latents [b, ...]) -> Media` of b samples.
    schedule: `(steps, shift) -> Schedule`. The shift is the time shift of rectified flow; 0 means
      the checkpoint's.
    prediction: what `denoise` predicts: "epsilon", "v" or "velocity".
    latent_shape: the shape of one sample's latents.
    sample_shape: the shape of one decoded sample: (height, width, 3), or (frames, height, width,
      3).
    components: the networks whose parameters `params` holds. The network that is trained is called
      "denoiser".
    trainable: what is trained: a component, or "lora".
    encoders: the components that only `encode` uses.
    adapters: None, unless "lora" is trained: then the abstract tree of the adapters, which `params`
      may hold beside the components.
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
  """How the networks of a family are built, from the config's section `model`.

  Attributes:
    size: height and width of the samples, in pixels.
    dtype: the dtype that the denoiser computes in. Its parameters are float32 where they are
      trained.
    frozen_dtype: the dtype that the other networks are stored and computed in. With adapters, the
      denoiser's parameters are stored in it too.
    remat: whether the denoiser's blocks are recomputed in the backward pass.
    attention: the implementation, see `models.attention.attention`.
    scan_blocks: whether the weights of equal blocks are stacked.
    lora: the adapters to train instead of the denoiser's parameters, or None.
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


class DiffusersCall(NamedTuple):
  """How diffusers draw what the evaluations of a run draw, for model cards.

  Attributes:
    scheduler: the scheduler as an expression in Python, in which `pipeline` is the pipeline; "" for
      that of the folder.
    arguments: of the pipeline's call, beside the prompt.
    result: where the sample is in what the call returns.
    fps: frames a second of a clip; 0 where the sample is an image.
  """

  scheduler: str
  arguments: dict[str, Any]
  result: str = "images[0]"
  fps: float = 0.0


def image_arguments(config: ConfigDict) -> dict[str, Any]:
  """What every pipeline of diffusers takes, with the values of a run's evaluations."""
  height, width = config.model.size
  return {"num_inference_steps": config.evaluation.steps, "height": height, "width": width}


def plain_call(config: ConfigDict, tokenizers: dict[str, Callable]) -> DiffusersCall:
  """`Family.diffusers_call` of a family of images, with the guidance and scheduler of the folder's
  own.
  """
  del tokenizers
  return DiffusersCall(scheduler="", arguments=image_arguments(config))


def no_options(config: ConfigDict) -> dict[str, Any]:
  """`Family.options` of a family whose `build` takes `ModelSettings` only."""
  del config
  return {}


class Family(NamedTuple):
  """A model family.

  pipelines/families.py lists the families of this package. A config may name another one as
  "module:object".

  Attributes:
    files: the JSON files of its checkpoints, by the key under which `build` gets them.
    tokenizers: the kind of each tokenizer, by folder: a name in `data.tokenizers.KINDS`, or a
      `TokenizerKind`.
    paradigm: how its denoiser was trained: "diffusion" or "flow" (rectified flow).
    build: `(jsons, tokenizers by folder, settings, **options) -> Pipeline`. It raises ValueError
      where a file or a setting has a value that is not implemented.
    networks: its networks, by their class in PyTorch.
    options: `(config) -> options`, the keyword arguments of `build` beside the common settings.
    text_length: `(jsons) -> tokens`, the length of a tokenised text, for plans of checkpoints
      without tokenizers.
    index_file: `layout.INDEX` where its checkpoints are diffusers pipelines; "" for another layout.
    diffusers_call: `(config, tokenizers by folder) -> DiffusersCall`, where its checkpoints are
      diffusers pipelines.
    pipelines: the classes of diffusers pipelines whose folders are its checkpoints, for messages on
      folders of another family; () where any may be.
    videos: whether it draws clips, of `config.model.frames` frames. A family that draws images
      alone takes 1 there.
  """

  files: dict[str, str]
  tokenizers: dict[str, str | TokenizerKind]
  paradigm: str
  build: Callable[..., Pipeline]
  networks: dict[str, Network]
  options: Callable[[ConfigDict], dict[str, Any]] = no_options
  text_length: Callable[[dict[str, dict]], int] = lambda jsons: 77
  index_file: str = ""
  diffusers_call: Callable[[ConfigDict, dict[str, Callable]], DiffusersCall] = plain_call
  pipelines: tuple[str, ...] = ()
  videos: bool = False

  @property
  def layout(self) -> Layout:
    """The files of its checkpoints."""
    stems = dict.fromkeys(network.table.file for network in self.networks.values())
    layout = layout_of(self.files, self.tokenizers)
    return layout._replace(
      index_file=self.index_file, stems=tuple(stems) or STEMS, pipelines=self.pipelines
    )


def adapted(pipeline: Pipeline, settings: Lora | None) -> Pipeline:
  """The pipeline with trained adapters and a frozen denoiser; unchanged where `settings` is None.

  Raises:
    ValueError: the adapters match no layer, see `lora.chosen`.
  """
  if settings is None:
    return pipeline
  adapters = abstract(pipeline.components["denoiser"].abstract, settings)
  return pipeline._replace(trainable=COLLECTION, adapters=adapters)


def text_inputs(
  tokenize: Callable[[list[str]], PyTree],
) -> Callable[[list[Example]], PyTree]:
  """`Pipeline.prepare` of a model whose only inputs are prompts."""
  return lambda examples: tokenize([example.prompt for example in examples])
