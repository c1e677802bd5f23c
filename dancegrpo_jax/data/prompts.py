"""Prompts: read from a text file, a JSON list or a TFDS data set, and dealt out in batches by the
number of the iteration.
"""

import importlib
import json
import os

from ml_collections import ConfigDict

from dancegrpo_jax import installation
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.types import Example

FIELDS = ("prompt", "negative_prompt", "metadata")  # of an object in a .json list
TFDS_FIELDS = ("prompt", "caption")  # the first of these that a data set has is read
# The module that makes each TFDS data set of this project; its `builder` registers the name.
BUILDERS = {
  "emoji": "dancegrpo_jax.data.emoji_dataset",
  "hpdv2_prompts": "dancegrpo_jax.data.hpdv2_prompts",
}


def read_prompts(path: str, negative_prompt: str = "") -> list[Example]:
  """Reads a list of prompts.

  Args:
    path: one of
      - a text file in UTF-8 with one prompt on each line; blank lines and lines that start with "#"
        are skipped;
      - a .json file: a list of strings, or of objects with prompt, negative_prompt (optional) and
        metadata (optional);
      - "tfds:NAME[/CONFIG][#SPLIT]": the prompt or caption feature of a prepared TFDS data set in
        ArrayRecord format. Repeated texts are taken once, since a data set of pictures has several
        of each. The split is train unless it is named.
    negative_prompt: for prompts that have none.

  Returns:
    Examples in the order of the file, numbered from 0.

  Raises:
    ValueError: the source can't be used; one line that names it and what to do.
  """
  rows: list[dict]
  if path.startswith("tfds:"):
    rows = [{"prompt": text} for text in _read_tfds(path)]
  elif path.endswith(".json"):
    rows = _read_json(path)
  else:
    lines = (line.strip() for line in _read_text(path).split("\n"))
    rows = [{"prompt": line} for line in lines if line and not line.startswith("#")]
  if not rows:
    raise ValueError(
      f"prompts file {path} has no prompts: write one a line (lines that start with # are comments)"
    )
  return [
    Example(
      id=number,
      prompt=row["prompt"],
      negative_prompt=row.get("negative_prompt", negative_prompt),
      metadata=row.get("metadata"),
    )
    for number, row in enumerate(rows)
  ]


def _read_text(path: str) -> str:
  try:
    # "-sig" skips the byte-order mark that editors on Windows write.
    return installation.find(path).read_text(encoding="utf-8-sig")
  except (FileNotFoundError, NotADirectoryError) as error:
    raise ValueError(
      f"prompts file not found: {path} (from {os.getcwd()}); set data.prompts to an existing file"
    ) from error
  except IsADirectoryError as error:
    raise ValueError(
      f"prompts file {path} is a folder; set data.prompts to a text or .json file"
    ) from error
  except PermissionError as error:
    raise ValueError(
      f"prompts file {path} can't be read: no permission; chmod it or name another"
    ) from error
  except UnicodeDecodeError as error:
    raise ValueError(
      f"prompts file {path} is not UTF-8 (byte {error.start}); convert it, e.g. with iconv -t UTF-8"
    ) from error


def _read_json(path: str) -> list[dict]:
  try:
    rows = json.loads(_read_text(path) or "[]")
  except json.JSONDecodeError as error:
    raise ValueError(
      f"prompts file {path} is not valid JSON: {error.msg} at line {error.lineno},"
      f" column {error.colno}; correct it, or use a .txt file"
    ) from error
  if not isinstance(rows, list):
    raise ValueError(
      f"prompts file {path} holds a {type(rows).__name__}; it must be a list of strings or of"
      " objects"
    )
  return [_check_row(path, i, row) for i, row in enumerate(rows)]


def _check_row(path: str, i: int, row) -> dict:
  """One entry of a .json list as an object, checked."""
  row = {"prompt": row} if isinstance(row, str) else row
  where = f"prompts file {path}, entry {i}"
  if not isinstance(row, dict):
    raise ValueError(
      f"{where} is a {type(row).__name__}; it must be a string or an object with a prompt"
    )
  unknown = sorted(set(row) - set(FIELDS))
  if unknown:
    raise ValueError(
      f"{where} has unknown fields {', '.join(unknown)}; known are {', '.join(FIELDS)}"
    )
  for field, missing in (("prompt", None), ("negative_prompt", "")):
    if not isinstance(row.get(field, missing), str):
      raise ValueError(f"{where}: {field} must be a string, not {row.get(field)!r}")
  if not row["prompt"].strip():
    raise ValueError(f"{where}: prompt is empty; remove the entry")
  if not isinstance(row.get("metadata", {}), dict | None):
    raise ValueError(f"{where}: metadata must be an object, not {row['metadata']!r}")
  return row


def _read_tfds(source: str) -> list[str]:
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
  return list(dict.fromkeys(text.decode() if isinstance(text, bytes) else text for text in texts))


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


def read_examples(config: ConfigDict) -> list[Example]:
  """The training prompts. ConfigError as the ValueError of `read_prompts`."""
  try:
    return read_prompts(config.data.prompts, config.data.negative_prompt)
  except ValueError as error:
    raise ConfigError(str(error)) from error


def read_held_out(config: ConfigDict) -> list[Example]:
  """The prompts of data.held_out; [] where it is "". ConfigError as `read_examples`."""
  if not config.data.held_out:
    return []
  try:
    return read_prompts(config.data.held_out, config.data.negative_prompt)
  except ValueError as error:
    raise ConfigError(str(error)) from error
