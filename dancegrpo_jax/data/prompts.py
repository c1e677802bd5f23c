"""Prompts: read from a file or a TFDS data set, and dealt out in batches by the number of the
iteration.
"""

import hashlib
import importlib
import json
import os
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from dancegrpo_jax.data import prompt_files
from dancegrpo_jax.data.prompt_files import METADATA, NEGATIVE, Content, Row, plain, prompt_name
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.types import Example

TFDS_FIELDS = ("prompt", "caption")  # the first of these that a data set has is read
# The module that makes each TFDS data set of this project; its `builder` registers the name.
BUILDERS = {
  "emoji": "dancegrpo_jax.data.emoji_dataset",
  "hpdv2_prompts": "dancegrpo_jax.data.hpdv2_prompts",
}


class Prompts(NamedTuple):
  """The prompts of one source.

  Attributes:
    examples: in the order of the source, numbered from 0.
    summary: one line for the user: how many, from where, and what was left out.
  """

  examples: list[Example]
  summary: str


def read(path: str, negative_prompt: str = "") -> Prompts:
  """Reads a list of prompts.

  Args:
    path: one of
      - a .txt file with one prompt on each line;
      - a .json file: a list of strings or of objects;
      - a .jsonl file: a string or an object on each line;
      - a .csv or .tsv file, whose first line names the columns;
      - "tfds:NAME[/CONFIG][#SPLIT]": the prompt or caption feature of a prepared TFDS data set in
        ArrayRecord format. Repeated texts are taken once, since a data set of pictures has several
        of each. The split is train unless it is named.
      The prompt of an object or a row has a name of `prompt_files.NAMES`. `negative_prompt` is
      optional. All other keys or columns are the metadata, and so is what an object `metadata`
      holds.
    negative_prompt: for prompts that have none.

  Raises:
    ValueError: the source can't be used; one line that names it and what to do.
  """
  content = _read_tfds(path) if path.startswith("tfds:") else prompt_files.read(path)
  examples = [_example(i, row, negative_prompt) for i, row in enumerate(content.rows)]
  return Prompts(examples, f"{len(examples)} of {path}{_remarks(content, examples)}")


def read_prompts(path: str, negative_prompt: str = "") -> list[Example]:
  """The examples of `read`, whose arguments and errors it has."""
  return read(path, negative_prompt).examples


def _example(number: int, row: Row, negative_prompt: str) -> Example:
  """The example of a row, with this id. ValueError: a value can't be used."""
  where, fields = row.where, dict(row.fields)
  prompt = _text(where, fields, prompt_name(where, list(fields)))
  if not prompt.strip():
    raise ValueError(f"{where}: prompt is empty; remove the entry")
  negative = [name for name in fields if plain(name) == NEGATIVE]
  if len(negative) > 1:
    raise ValueError(f"{where} has the keys {' and '.join(map(repr, negative))}; remove one")
  if negative:
    negative_prompt = _text(where, fields, negative[0])
  return Example(
    id=number,
    prompt=prompt,
    negative_prompt=negative_prompt,
    metadata=_metadata(where, fields),
  )


def _text(where: str, fields: dict[str, Any], name: str) -> str:
  """Takes the text of a key out of `fields`. ValueError: it is no text."""
  value = fields.pop(name)
  if not isinstance(value, str):
    raise ValueError(f"{where}: {name} must be a string, not {value!r}")
  try:
    value.encode()
  except UnicodeEncodeError as error:  # JSON can write half of a character, as "\ud83d"
    raise ValueError(f"{where}: {name} {value!r} holds half of a character; correct it") from error
  return value


def _metadata(where: str, fields: dict[str, Any]) -> dict[str, Any] | None:
  """The keys that are left and what an object `metadata` holds. None where there is nothing."""
  if METADATA not in fields or isinstance(fields[METADATA], str):  # a column of that name is text
    return fields or None
  inner = fields.pop(METADATA)
  if not isinstance(inner, dict | None):
    raise ValueError(f"{where}: metadata must be an object, not {inner!r}")
  if both := fields.keys() & (inner or {}).keys():
    raise ValueError(f"{where} has {min(both)!r} twice, inside of metadata too; rename one")
  return fields | (inner or {}) if fields else inner


def _remarks(content: Content, examples: list[Example]) -> str:
  """What was left out and what the user should know, in brackets; "" where there is nothing."""
  left_out = [f"{n} {what}{'s' * (n > 1)}" for what, n in content.left_out.items() if n]
  remarks = [f"{' and '.join(left_out)} left out"] if left_out else []
  again = len(examples) - len({example.prompt for example in examples})
  if again:
    remarks.append(f"{again} with the text of an earlier one, kept")
  remarks += content.notes
  return f" ({'; '.join(remarks)})" if remarks else ""


def digest(examples: list[Example]) -> str:
  """16 hexadecimal digits that identify the examples: ids, texts and metadata, in order."""
  rows = json.dumps([example._asdict() for example in examples], sort_keys=True, default=repr)
  return hashlib.sha256(rows.encode()).hexdigest()[:16]


def _read_tfds(source: str) -> Content:
  """The different texts of a TFDS split, in the order of their first appearance."""
  # Imported here because it is slow to import, and other sources don't need it.
  import tensorflow_datasets as tfds

  name, _, split = source.removeprefix("tfds:").partition("#")
  module = BUILDERS.get(name.partition("/")[0])
  if module:
    importlib.import_module(f"{module}.builder")
  try:
    # TFDS itself reads the variable only when it is imported.
    builder = tfds.builder(name, data_dir=os.environ.get("TFDS_DATA_DIR"))
    others = [feature for feature in builder.info.features if feature not in TFDS_FIELDS]
    data = builder.as_data_source(
      split=split or "train", decoders={other: tfds.decode.SkipDecoding() for other in others}
    )
  except Exception as error:  # TFDS raises a dozen types, with messages of many lines
    reason = str(error).strip().split("\n")[0][:200]
    how = f" with `python -m {module}`" if module else ""
    raise ValueError(
      f"prompts source {source} can't be opened ({reason}); prepare it as ArrayRecord files"
      f" first{how}, and set TFDS_DATA_DIR"
    ) from error
  field = next((field for field in TFDS_FIELDS if field in builder.info.features), None)
  if field is None:
    known = ", ".join(builder.info.features)
    raise ValueError(
      f"prompts source {source} has no feature {' or '.join(TFDS_FIELDS)}, only {known}; name"
      " another"
    )
  texts = (data[i][field] for i in range(len(data)))
  different = dict.fromkeys(text.decode() if isinstance(text, bytes) else text for text in texts)
  rows = [Row(f"prompts source {source}, {text!r}", {"prompt": text}) for text in different]
  return Content(rows, {"repeated text": len(data) - len(rows)})


def prompt_batches(examples: list[Example], prompts_per_iteration: int, seed: int, shuffle: bool):
  """The prompts of every iteration: `batches[iteration]` is a list of `prompts_per_iteration`
  different examples.

  Access is random: a batch depends only on the seed and the iteration. A resumed run therefore
  needs no iterator state, and every host of a pod computes the same batch.

  Args:
    examples: the whole list.
    prompts_per_iteration: P, at most the number of examples.
    seed: of the orders.
    shuffle: true gives each epoch a new order. The examples at the end of an epoch that don't fill
      a batch are dropped, because a batch over two epochs could hold one prompt twice. False keeps
      the order of the list, which is repeated without dropping anything.

  Returns:
    An endless `grain.MapDataset` of lists.

  Raises:
    ValueError: P is below 1 or above the number of examples.
  """
  # Imported here because it is slow to import, and reading prompts doesn't need it.
  import grain

  if not 1 <= prompts_per_iteration <= len(examples):
    raise ValueError(
      f"data.prompts_per_iteration is {prompts_per_iteration}, but must be from 1 to the number"
      f" of prompts, {len(examples)}: lower it, or give more prompts"
    )
  dataset = grain.MapDataset.source(examples).seed(seed % 2**32)
  if shuffle:
    return (
      dataset.shuffle().batch(prompts_per_iteration, drop_remainder=True, batch_fn=list).repeat()
    )
  return dataset.repeat().batch(prompts_per_iteration, batch_fn=list)


def read_field(config: ConfigDict, field: str) -> Prompts:
  """The prompts of `config.data.<field>`: "prompts", or "held_out", which may be "" for none.

  Raises:
    ConfigError: as the ValueError of `read`.
  """
  path = config.data[field]
  if field == "held_out" and not path:
    return Prompts([], "")
  try:
    return read(path, config.data.negative_prompt)
  except ValueError as error:
    raise ConfigError(str(error)) from error


def read_examples(config: ConfigDict) -> list[Example]:
  """The training prompts. ConfigError as `read_field`."""
  return read_field(config, "prompts").examples


def read_held_out(config: ConfigDict) -> list[Example]:
  """The prompts of data.held_out; [] where it is "". ConfigError as `read_field`."""
  return read_field(config, "held_out").examples
