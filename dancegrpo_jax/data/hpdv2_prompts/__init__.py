"""The data set `hpdv2_prompts`, made by the TFDS builder in `builder.py`.

This module is light to import: TensorFlow Datasets is imported on first use.
"""

import os


def load(split: str = "train", *, data_dir: str | None = None, json_file: str | None = None):
  """Makes the data set if it isn't on disk yet, and opens it for random access.

  Args:
    split: "train", the only one.
    data_dir: folder of all TFDS data sets; None is $TFDS_DATA_DIR, else ~/tensorflow_datasets.
    json_file: HPDv2's train.json; None fetches it from the hub where it isn't cached. It is read
      only when the data set is made.

  Returns:
    A sequence of dicts: prompt (bytes).

  Raises:
    FileNotFoundError: the file is not there, or can't be fetched; one line that says what to do.
    ValueError: the file isn't HPDv2's list.
  """
  from dancegrpo_jax.data.hpdv2_prompts.builder import Hpdv2Prompts

  builder = Hpdv2Prompts(data_dir=data_dir or os.environ.get("TFDS_DATA_DIR"), json_file=json_file)
  builder.download_and_prepare()
  return builder.as_data_source(split=split)
