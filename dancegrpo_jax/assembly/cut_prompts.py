"""Which prompts the tokenizers of a run cut: those of the model and those of its rewards."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from dancegrpo_jax.assembly import encoding, loading, reward_builders
from dancegrpo_jax.data import cut_texts
from dancegrpo_jax.pipelines.layout import Tokenizer
from dancegrpo_jax.rewards.base import Files
from dancegrpo_jax.types import Example


class Limit(NamedTuple):
  """A tokenizer and the number of tokens that texts are cut to."""

  tokenizer: Tokenizer
  length: int


def of_model(config: ConfigDict) -> dict[str, Limit]:
  """The model's tokenizers by folder, as "tokenizer/".

  A family decides itself how many tokens it asks a tokenizer for. So a pipeline is built here whose
  tokenizers note that, and is given a blank example. Tokenizers of a kind of the user's own are
  left out, since they don't say how long texts are.

  Raises:
    ConfigError: as `loading.build_pipeline`.
  """
  jsons, tokenizers = loading.read_files(config)
  limits: dict[str, Limit] = {}
  noting = {place: _noting(limits, place, each) for place, each in tokenizers.items()}
  pipeline = loading.pipeline_of(config, jsons, noting)
  pipeline.prepare(encoding.as_examples([""]))
  return limits


def _noting(limits: dict[str, Limit], place: str, tokenizer: Callable) -> Callable:
  """The tokenizer, which notes its limit in `limits` when it is called with an empty prompt.

  A family may put a text around the prompt, whose tokens are not the prompt's.
  """
  if not isinstance(tokenizer, Tokenizer):
    return tokenizer

  def encode(texts: list[str], *length: int) -> np.ndarray:
    ids = tokenizer(texts, *length)
    around, nothing = tokenizer.lengths([texts[0], ""])
    limits[f"{place}/"] = Limit(tokenizer, ids.shape[-1] - (around - nothing))
    return ids

  return dataclasses.replace(tokenizer, encode=encode)


def noting_files(limits: dict[str, Limit], files: Files = reward_builders.FILES) -> Files:
  """`files`, except that the limits of a reward's tokenizers are noted in `limits`."""

  def load(field: str, source: str, network: dict[str, Any]) -> Callable:
    tokenizer = files.tokenizer(field, source, network)
    if isinstance(tokenizer, Tokenizer):
      name = f"{field.removesuffix('.tokenizer')}'s tokenizer"
      limits[name] = Limit(tokenizer, tokenizer([""]).shape[-1])
    return tokenizer

  return files._replace(tokenizer=load)


def lines(
  config: ConfigDict, limits: dict[str, Limit], groups: dict[str, list[Example]]
) -> list[str]:
  """A line for each tokenizer that cuts a prompt, or a negative prompt where one is used.

  Args:
    config: of the run.
    limits: tokenizers by name.
    groups: examples by what they are, as {"prompts": [...], "held-out prompts": [...]}.
  """
  texts = {what: [example.prompt for example in examples] for what, examples in groups.items()}
  if config.sampler.guidance_scale != 1.0:
    negative = {example.negative_prompt for examples in groups.values() for example in examples}
    texts["negative prompts"] = sorted(negative)
  found = [
    cut_texts.line(limit.tokenizer, name, limit.length, texts) for name, limit in limits.items()
  ]
  return [line for line in found if line]
