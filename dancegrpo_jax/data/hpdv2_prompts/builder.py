"""The TFDS builder of HPDv2's training prompts (Wu et al., arXiv 2306.09341), which writes
ArrayRecord files and doesn't need TensorFlow.

train.json of the hub's data set ymhao/HPDv2 is a list of comparisons, each with a "prompt" and
several images. A prompt occurs many times. The images aren't fetched.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds

REPOSITORY, FILE = "ymhao/HPDv2", "train.json"
CITATION = "Human Preference Score v2, Wu et al. 2023, https://arxiv.org/abs/2306.09341"


def fetch() -> str:
  """The path of train.json in the Hugging Face cache, after a download where it isn't cached.

  Raises:
    FileNotFoundError: the download fails.
  """
  # Imported here because it is slow to import, and a local file doesn't need it.
  from huggingface_hub import hf_hub_download

  try:
    return hf_hub_download(REPOSITORY, FILE, repo_type="dataset")
  except Exception as error:  # no network, offline mode, no such file: the client has a dozen types
    reason = " ".join(str(error).split())[:200]
    raise FileNotFoundError(
      f"{REPOSITORY}/{FILE} is not cached and can't be fetched ({type(error).__name__}: {reason});"
      f" where there is a network run `hf download {REPOSITORY} {FILE} --repo-type dataset"
      f" --local-dir DIR`, copy the file here and give --json=DIR/{FILE}"
    ) from error


def unique_prompts(path: str) -> Iterator[str]:
  """Every prompt once, in the order of their first appearance, with single spaces for all white
  space and none at the ends.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the file is not a JSON list of objects with a text "prompt".
  """
  if not Path(path).is_file():
    raise FileNotFoundError(f"{path}: no such file; give HPDv2's {FILE} with --json=PATH")
  try:
    rows = json.loads(Path(path).read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"{path}: not valid JSON ({error}); fetch HPDv2's {FILE} again") from error
  if not isinstance(rows, list):
    raise ValueError(
      f"{path}: holds a {type(rows).__name__}; HPDv2's {FILE} is a list of objects with a prompt"
    )
  seen = set()
  for i, row in enumerate(rows):
    text = row.get("prompt") if isinstance(row, dict) else None
    if not isinstance(text, str):
      raise ValueError(
        f"{path}, entry {i}: has no text prompt; HPDv2's {FILE} is a list of objects with a prompt"
      )
    text = " ".join(text.split())
    if text and text not in seen:
      seen.add(text)
      yield text


class Hpdv2Prompts(tfds.core.GeneratorBasedBuilder):
  """The different prompts of HPDv2's training comparisons."""

  name = "hpdv2_prompts"
  VERSION = tfds.core.Version("1.0.0")
  RELEASE_NOTES = {"1.0.0": "Unique prompts of train.json, in its order."}

  def __init__(self, *, json_file: str | None = None, file_format="array_record", **kwargs):
    """`json_file` is train.json; None fetches it."""
    self.json_file = json_file
    super().__init__(file_format=file_format, **kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=Hpdv2Prompts.__doc__,
      features=tfds.features.FeaturesDict({"prompt": tfds.features.Text()}),
      homepage="https://huggingface.co/datasets/ymhao/HPDv2",
      citation=CITATION,
      # Rows stay in the file's order, so that an index means the same everywhere.
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager) -> dict:
    del (
      dl_manager
    )  # The Hugging Face cache is used instead, where other programs find the file too.
    return {"train": self._generate_examples(self.json_file or fetch())}

  def _generate_examples(self, path: str):
    for i, text in enumerate(unique_prompts(path)):
      yield i, {"prompt": text}
