"""Builds linen modules from published config.json files, of which no key is ignored; see
`published`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

import flax.linen as nn

from dancegrpo_jax import published
from dancegrpo_jax.published import Keys

Network = TypeVar("Network", bound=nn.Module)

# Fields of networks that no file sets: how they are computed, and what linen adds.
_NOT_IN_FILES = frozenset(
  {
    "dtype",
    "impl",
    "name",
    "param_dtype",
    "parent",
    "remat",
    "scan_blocks",
    "scan_layers",
  }
)


def _because(reason: str, *keys: str) -> dict[str, str]:
  return dict.fromkeys(keys, reason)


# What transformers may write into any config.json. Most of it is about text generation, which the
# encoders here don't do, and stands in files of 2022 alone.
TRANSFORMERS_NEUTRAL = {
  "add_cross_attention": (False,),
  "is_decoder": (False,),
  "pruned_heads": ({}, None),
  "tie_encoder_decoder": (False,),
}
TRANSFORMERS_HARMLESS = {
  **_because(
    "describes the file",
    "architectures",
    "dtype",
    "name_or_path",
    "tokenizer_class",
    "torch_dtype",
    "transformers_version",
  ),
  **_because(
    "concerns training from scratch",
    "attention_dropout",
    "classifier_dropout",
    "dropout",
    "dropout_rate",
    "gradient_checkpointing",
    "initializer_factor",
    "initializer_range",
  ),
  **_because(
    "concerns heads that are not built here",
    "finetuning_task",
    "id2label",
    "is_encoder_decoder",
    "label2id",
    "num_labels",
    "problem_type",
    "task_specific_params",
    "tie_word_embeddings",
  ),
  **_because(
    "says what a call returns, or how it is computed, but not its values",
    "chunk_size_feed_forward",
    "output_attentions",
    "output_hidden_states",
    "output_past",
    "return_dict",
    "torchscript",
    "use_bfloat16",
    "use_cache",
  ),
  **_because("is the tokenizer's business", "bos_token_id", "pad_token_id", "sep_token_id"),
  **_because(
    "concerns the generation of text",
    "bad_words_ids",
    "begin_suppress_tokens",
    "cross_attention_hidden_size",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "length_penalty",
    "max_length",
    "min_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_scores",
    "prefix",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict_in_generate",
    "suppress_tokens",
    "temperature",
    "tf_legacy_loss",
    "top_k",
    "top_p",
    "typical_p",
  ),
}


def keys_of(
  network: type[nn.Module],
  neutral: Mapping[str, tuple[Any, ...]] = {},
  harmless: Mapping[str, str] = {},
  types: Mapping[str, tuple[type, ...]] = {},
) -> Keys:
  """What is done with the keys of a network's config.json.

  Args:
    network: a linen class. Its fields have the names of the file's keys, and the defaults of the
      library that wrote the file. A field without a default must be in the file.
    neutral, harmless, types: see `Keys`.
  """
  used = {
    field.name: published.REQUIRED if field.default is dataclasses.MISSING else field.default
    for field in dataclasses.fields(network)
    if field.name not in _NOT_IN_FILES
  }
  return Keys(used=used, neutral=neutral, harmless=harmless, types=types)


def from_config(
  network: type[Network], keys: Keys, config_json: Mapping[str, Any], **extra: Any
) -> Network:
  """Builds a network from its config.json.

  Args:
    network: the linen class.
    keys: of `keys_of`.
    config_json: the parsed file.
    extra: fields that are not in the file, for example dtype and remat.

  Raises:
    ValueError: a key that is unknown, or has a value that is not implemented. The message names
      each.
  """
  kind = config_json.get("_class_name", network.__name__)
  if kind != network.__name__:
    raise ValueError(f"config.json is that of a {kind}, where a {network.__name__} is needed")
  fields = published.read(f"{network.__name__}'s config.json", config_json, keys)
  return network(**{name: _hashable(value) for name, value in fields.items()}, **extra)


def require_lengths(network: nn.Module, name: str, *lists: str) -> None:
  """Checks that lists of a network's config.json have one entry for each of its stages.

  Args:
    network: built from the file.
    name: of the list whose length is the number of stages.
    lists: names of the others. A value that is no list holds for every stage.

  Raises:
    ValueError: a list has another length.
  """
  stages = len(getattr(network, name))
  for other in lists:
    value = getattr(network, other)
    if isinstance(value, tuple) and len(value) != stages:
      raise ValueError(
        f"{type(network).__name__}'s config.json: {other} has {len(value)} entries and {name}"
        f" {stages}; they must have as many"
      )


def _hashable(value: Any) -> Any:
  return tuple(_hashable(item) for item in value) if isinstance(value, list | tuple) else value
