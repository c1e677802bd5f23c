"""The family: which files a checkpoint consists of, and how they become a `Pipeline`.

A config names it as `model.family = "own_family.family:FAMILY"`. A checkpoint is a folder:

    model.json              what the pixels were shifted and scaled by, and the time shift
    mixer/config.json       the denoiser, with mixer.safetensors
    words/config.json       the text encoder, with words.safetensors
    words/vocabulary.json   the words that it knows, and how many of a text it reads
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dancegrpo_jax.diffusion import schedules
from dancegrpo_jax.models.lora import variables
from dancegrpo_jax.pipelines.base import Family, ModelSettings, Pipeline, adapted, text_inputs
from dancegrpo_jax.pipelines.layout import Component, Network, TokenizerKind
from dancegrpo_jax.pipelines.networks import abstract
from dancegrpo_jax.types import Media, PyTree

from . import model, table

FILES = {"model": "model.json", "mixer": "mixer/config.json", "words": "words/config.json"}
VOCABULARY = "vocabulary.json"
OTHER = 1  # the word that stands for every word that isn't known


def load_words(folder: str) -> Callable[[list[str]], np.ndarray]:
  """The tokenizer of a folder: texts -> int32 `[n, length]`, one number a word, filled up with
  `model.PAD`.

  Raises:
    ValueError: its vocabulary.json is no vocabulary.
  """
  file = Path(folder) / VOCABULARY
  try:
    content = json.loads(file.read_text())
    numbers, length = {word: i for i, word in enumerate(content["words"])}, content["length"]
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(f"{file}: not a vocabulary with words and length: {error}") from error

  def tokenize(texts: list[str]) -> np.ndarray:
    result = np.full((len(texts), length), model.PAD, np.int32)
    for row, text in zip(result, texts, strict=True):
      known = [numbers.get(word, OTHER) for word in text.lower().split()][:length]
      row[: len(known)] = known
    return result

  return tokenize


def build(
  jsons: dict[str, dict[str, Any]],
  tokenizers: dict[str, Callable[[list[str]], np.ndarray]],
  settings: ModelSettings,
) -> Pipeline:
  """The pipeline of a checkpoint's JSON files.

  Args:
    jsons: parsed files, by the keys of `FILES`.
    tokenizers: by folder.
    settings: there is no attention to choose and there are few blocks to stack, so these two fields
      are not read.

  Raises:
    ValueError: another size than the network's, networks that do not fit each other, adapters of
      nothing, or a config.json that asks for what is not implemented.
  """
  frozen = jnp.dtype(settings.frozen_dtype)
  denoiser = model.mixer_from_json(
    jsons["mixer"],
    dtype=jnp.dtype(settings.dtype),
    param_dtype=settings.stored,
    remat=settings.remat,
  )
  words = model.words_from_json(jsons["words"], dtype=frozen, param_dtype=frozen)
  if tuple(settings.size) != (denoiser.size, denoiser.size):
    raise ValueError(
      f"config.model.size = {tuple(settings.size)}: this checkpoint draws"
      f" {denoiser.size} x {denoiser.size} pixels and nothing else"
    )
  if denoiser.text_width != words.width:
    raise ValueError(
      f"mixer/config.json: text_width {denoiser.text_width} is not the width {words.width} of"
      " words/config.json"
    )
  lacking = [key for key in ("mean", "std", "shift") if key not in jsons["model"]]
  if lacking:
    raise ValueError(f"model.json lacks {', '.join(lacking)}")
  mean, std, own_shift = (jsons["model"][key] for key in ("mean", "std", "shift"))
  shape = (denoiser.size, denoiser.size, 3)

  def encode(params: PyTree, tokens: Int[Array, "n t"]) -> Float[Array, "n d"]:
    return words.apply({"params": params["words"]}, tokens)

  def denoise(
    params: PyTree, x: Float[Array, "b h w 3"], time: Float[Array, "b"], rows: Float[Array, "b d"]
  ) -> Float[Array, "b h w 3"]:
    return denoiser.apply(variables(params, settings.lora), x, time, rows)

  def decode(params: PyTree, latents: Float[Array, "b h w 3"]) -> Media:
    del params  # the latents are the pixels, shifted and scaled
    return Media(jnp.clip(latents * std + mean, 0.0, 1.0))

  def schedule(steps: int, shift: float) -> schedules.Schedule:
    return schedules.flow_schedule(steps, shift or own_shift, model.TIME_SCALE)

  base = Pipeline(
    prepare=text_inputs(tokenizers["words"]),
    encode=encode,
    denoise=denoise,
    decode=decode,
    schedule=schedule,
    prediction="velocity",
    latent_shape=shape,
    sample_shape=shape,
    components={
      "denoiser": Component(folder="mixer", table=table.MIXER, abstract=_mixer(denoiser)),
      "words": Component(folder="words", table=table.WORDS, abstract=_words(words)),
    },
    encoders=("words",),
  )
  return adapted(base, settings.lora)


def _mixer(network: model.Mixer) -> PyTree:
  """Shapes and dtypes of a denoiser's parameters."""
  return abstract(network, (1, network.size, network.size, 3), (1,), (1, network.text_width))


def _words(network: model.Words) -> PyTree:
  """Shapes and dtypes of a text encoder's parameters."""
  return abstract(network, (1, 1), dtype=jnp.int32)


FAMILY = Family(
  files=FILES,
  tokenizers={"words": TokenizerKind(files=(VOCABULARY,), load=load_words)},
  paradigm="flow",
  build=build,
  networks={
    "Mixer": Network(
      table=table.MIXER, abstract=lambda config: _mixer(model.mixer_from_json(config))
    ),
    "Words": Network(
      table=table.WORDS, abstract=lambda config: _words(model.words_from_json(config))
    ),
  },
)
