"""Traces of some iterations for JAX's profiler."""

import contextlib
from pathlib import Path

import jax
from ml_collections import ConfigDict

from dancegrpo_jax.types import PyTree


def start_profile(config: ConfigDict, workdir: Path, iteration: int) -> None:
  """Starts a trace into <workdir>/profile before the first of logging.profile_steps."""
  if config.logging.profile_steps and iteration == config.logging.profile_steps[0]:
    jax.profiler.start_trace(str(workdir / "profile"))


def stop_profile(config: ConfigDict, iteration: int, result: PyTree) -> None:
  """Ends the trace after the last of logging.profile_steps, when `result` is ready."""
  if config.logging.profile_steps and iteration == config.logging.profile_steps[1]:
    jax.block_until_ready(result)
    end_trace()


def end_trace() -> None:
  """Ends the trace if one is running.

  None is running in a resumed run that began after the first of logging.profile_steps. One still is
  in a run that stops before the last of them.
  """
  with contextlib.suppress(RuntimeError):
    jax.profiler.stop_trace()
