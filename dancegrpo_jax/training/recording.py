"""Writes down how a run ends, so that its report can say so."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from dancegrpo_jax.report import page, status
from dancegrpo_jax.training.outcome import what_is_left


@contextlib.contextmanager
def recorded(workdir: Path) -> Iterator[None]:
  """Writes into status.json that the run inside has finished, or the error that has ended it. After
  an error the report is written again; after a finished run the caller does it.

  Nothing is written where the error came before the run began (`status.begin`).
  """
  try:
    yield
  except BaseException as error:
    with contextlib.suppress(Exception):  # a full disk must not hide the error
      if status.end_with_error(workdir, error, what_is_left(workdir)):
        page.write(workdir)
    raise
  status.end(workdir, status.FINISHED)
