"""Imports classes of transformers without what it says about a missing PyTorch."""

import os
from typing import Any

_VARIABLE = "TRANSFORMERS_NO_ADVISORY_WARNINGS"


def tokenizer_class(name: str) -> Any:
  """A tokenizer class of transformers, for example "CLIPTokenizer".

  Where PyTorch is not installed, transformers says at its import that models won't be available.
  Only its tokenizers are used here, so that would be noise before every command.
  """
  before = os.environ.get(_VARIABLE)
  os.environ[_VARIABLE] = before or "1"
  try:
    import transformers  # late: it is slow to import

    return getattr(transformers, name)
  finally:
    if before is None:
      del os.environ[_VARIABLE]
    else:
      os.environ[_VARIABLE] = before
