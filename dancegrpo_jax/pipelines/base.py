"""What a model family offers to the rest: a `Pipeline` of pure functions, and the weights that it
needs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from dancegrpo_jax.diffusion.schedules import Schedule
from dancegrpo_jax.models import lora
from dancegrpo_jax.types import PyTree


class Component(NamedTuple):
  """One network's weights, still to be loaded.

  Attributes:
    folder: inside the checkpoint.
    table: the conversion table's name, the network's class in PyTorch.
    abstract: tree of shapes and dtypes.
  """

  folder: str
  table: str
  abstract: PyTree


class Pipeline(NamedTuple):
  """A text-to-image model. `params` below is a dict of trees by component: denoiser, text_encoder,
  decoder ...

  Attributes:
    tokenize: host function, `list[str] -> tokens`, a pytree of int32 `[n, tokens]`.
    encode: `(params, tokens) -> rows`, a pytree with one row a text, as `denoise` takes it.
    denoise: `(params, x [b, ...], model_time [b], rows) -> output [b, ...]`.
    decode: `(params, latents [b, ...]) -> pixels [b, h, w, 3]` in [0, 1].
    schedule: `(steps, shift) -> Schedule`; the shift is rectified flow's, 0 = the checkpoint's own.
    prediction: "epsilon", "v" or "velocity".
    latent_shape: of one sample.
    components: what `params` consists of.
    trainable: what is trained: a component, or "lora".
    encoders: the components that `encode` alone reads.
    adapters: where "lora" is trained, the abstract tree that `params` then may hold beside the
      components; else None.
  """

  tokenize: Callable[[list[str]], PyTree]
  encode: Callable[[PyTree, Any], PyTree]
  denoise: Callable[[PyTree, Any, Any, PyTree], Any]
  decode: Callable[[PyTree, Any], Any]
  schedule: Callable[[int, float], Schedule]
  prediction: str
  latent_shape: tuple[int, ...]
  components: dict[str, Component]
  trainable: str = "denoiser"
  encoders: tuple[str, ...] = ("text_encoder",)
  adapters: PyTree | None = None


def adapted(pipeline: Pipeline, settings: lora.Lora | None) -> Pipeline:
  """The pipeline with its denoiser frozen under trained adapters; unchanged without settings.
  ValueError as `lora.chosen`.
  """
  if settings is None:
    return pipeline
  adapters = lora.abstract(pipeline.components["denoiser"].abstract, settings)
  return pipeline._replace(trainable=lora.COLLECTION, adapters=adapters)
